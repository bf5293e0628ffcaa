//! What a proxy does instead of connecting.

/// Why a proxy did not connect. What it means for a person is said by [`super::super::ConnectError::Proxy`], which also
/// names the proxy and what it was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProxyFailure {
    /// The proxy's name does not resolve.
    NameUnknown(String),
    /// No TCP connection to the proxy.
    Unreachable(String),
    /// It takes the connection, and then nothing.
    Silent,
    /// It closed the connection instead of answering.
    Closed(String),
    /// It answers, but not as such a proxy does.
    NotAProxy(String),
    /// It wants a name and a password, and has been given none.
    AuthNeeded(String),
    /// It does not accept the name and the password.
    AuthRefused(String),
    /// It wants to know who asks in a way that meshd cannot.
    AuthUnsupported(String),
    /// Its rules do not allow this connection.
    Forbidden(String),
    /// It may connect, and cannot.
    NoWay(String),
    /// It refuses in another way.
    Refused(String),
}

impl ProxyFailure {
    /// A stable word for programs.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::NameUnknown(_) => "proxy-dns",
            Self::Unreachable(_) => "proxy-unreachable",
            Self::Silent => "proxy-timeout",
            Self::Closed(_) => "proxy-closed",
            Self::NotAProxy(_) => "not-a-proxy",
            Self::AuthNeeded(_) => "proxy-auth-needed",
            Self::AuthRefused(_) => "proxy-auth-refused",
            Self::AuthUnsupported(_) => "proxy-auth-unsupported",
            Self::Forbidden(_) => "proxy-forbidden",
            Self::NoWay(_) => "proxy-no-way",
            Self::Refused(_) => "proxy-refused",
        }
    }

    /// What the person can do.
    #[must_use]
    pub const fn hint(&self) -> &'static str {
        match self {
            Self::NameUnknown(_) => {
                "check the proxy's name and this machine's DNS; `meshd up --proxy none` goes without a proxy"
            }
            Self::Unreachable(_) => {
                "check the proxy's address and port, and that this is the network it serves; `meshd up --proxy none` goes without one"
            }
            Self::Silent => "check the proxy's port and kind (http:// or socks5://), and whether it is overloaded",
            Self::Closed(_) => {
                "check the proxy's kind (http:// or socks5://), and that it lets this machine in; its log may say more"
            }
            Self::NotAProxy(_) => "check the proxy's port and kind: http:// for HTTP CONNECT, socks5:// for SOCKS5",
            Self::AuthNeeded(_) => {
                "give them in the proxy's URL, http://NAME:PASSWORD@HOST:PORT, in a file: `meshd up --proxy-file FILE`"
            }
            Self::AuthRefused(_) => {
                "correct them (signs such as @ and : as %40 and %3A in the URL) and give the URL anew: `meshd up --proxy-file FILE`"
            }
            Self::AuthUnsupported(_) => {
                "ask for an account with a password (Basic), or run a local proxy that does the other kind, and name that"
            }
            Self::Forbidden(_) => {
                "ask whoever runs the proxy to allow the coordinator's host and port; port 443 is allowed most often"
            }
            Self::NoWay(_) => {
                "check that the coordinator runs and that its --public-url is right as seen from the proxy"
            }
            Self::Refused(_) => "the proxy's log may say more; `meshd up --proxy none` goes without a proxy",
        }
    }

    /// The sentence, about this proxy and what it was asked to reach.
    pub(in crate::link) fn sentence(&self, proxy: &str, target: &str) -> String {
        match self {
            Self::NameUnknown(cause) => format!("the name of the proxy {proxy} cannot be resolved: {cause}"),
            Self::Unreachable(cause) => format!("the proxy {proxy} cannot be reached: {cause}"),
            Self::Silent => format!("the proxy {proxy} takes the connection and then does not answer"),
            Self::Closed(how) => format!("the proxy {proxy} closed the connection instead of answering ({how})"),
            Self::NotAProxy(what) => format!("what answers at {proxy} is not such a proxy: {what}"),
            Self::AuthNeeded(how) => {
                format!("the proxy {proxy} wants a name and a password, and none were given ({how})")
            }
            Self::AuthRefused(how) => format!("the proxy {proxy} does not accept the name and password given ({how})"),
            Self::AuthUnsupported(how) => {
                format!("the proxy {proxy} wants an authentication that meshd cannot do ({how})")
            }
            Self::Forbidden(how) => format!("the proxy {proxy} does not allow connections to {target} ({how})"),
            Self::NoWay(how) => format!("the proxy {proxy} cannot reach the coordinator at {target} ({how})"),
            Self::Refused(how) => format!("the proxy {proxy} refuses to connect to {target} ({how})"),
        }
    }
}
