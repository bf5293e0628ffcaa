//! Networks that let almost nothing out: only TCP 443, only a proxy; and proxies that do something else instead.
//!
//! ```text
//!   coordinator .10/.11
//!         │ 5 ms
//!  ───────┴──── internet 203.0.113.0/24 ──
//!     │ 10 ms                 │ 10 ms
//!  [gate ra .21]           [NAT rb .22]        relayed 30 ms one way, direct 20 ms
//!     │ 192.168.21.0/24       │
//!     a .2                    b .2
//! ```

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context as _, Result};
use meshd::cli::demo::net::{Namespace, Nat, Router, Segment};

use super::stun::installed;
use crate::packets::delay;
use crate::runner::{Case, case, skip};
use crate::world::{Coordinator, Node, World, ensure, error_of, eventually, inherit_nothing, until, wait_for_peers};

pub fn cases() -> Vec<Case> {
    vec![
        case("relay::first_reply_within_300_ms_when_udp_is_blocked_on_one_side", udp_blocked),
        case("relay::first_reply_within_500_ms_when_only_tcp_443_is_open", only_443),
        case("proxy::only_an_http_proxy_leads_out", only_http_proxy),
        case("proxy::only_socks5_and_http_proxies_lead_out_and_they_resolve_the_name", only_proxies),
        case("proxy::environment_and_no_proxy", environment),
        case("proxy::what_a_proxy_does_instead_is_named", misbehaviour),
        case("proxy::a_running_node_names_what_the_proxy_does_and_recovers", turns_bad),
        case("proxy::a_refused_relay_link_is_named", relay_refused),
    ]
}

/// Nothing but what the rule lets out is forwarded.
fn only(router: &Router, lets_out: &str) -> Result<()> {
    router.namespace.nft(&format!(
        "table inet only {{ chain forward {{ type filter hook forward priority -10; policy drop;\n\
         ct state established,related accept;\n {lets_out}\n }}\n }}\n"
    ))
}

/// The internet of the drawing, without a coordinator.
fn gates() -> Result<(Segment, Router, Router)> {
    let internet = Segment::internet()?;
    let (ra, rb) = (internet.router("ra", 21, Nat::Home)?, internet.router("rb", 22, Nat::Home)?);
    Ok((internet, ra, rb))
}

fn world(internet: Segment, url: &str, port: u16) -> Result<World> {
    let coordinator = Coordinator::start_listening(&internet, url, port)?;
    delays(internet, coordinator)
}

fn delays(internet: Segment, coordinator: Coordinator) -> Result<World> {
    delay(&internet, "coord", Duration::from_millis(5))?;
    delay(&internet, "ra", Duration::from_millis(10))?;
    delay(&internet, "rb", Duration::from_millis(10))?;
    Ok(World { internet, coordinator })
}

/// Five times: `a` is started anew, and its first packet to `b` is answered in time.
fn first_replies(a: &Node, b: &Node, limit_ms: f64) -> Result<()> {
    let mut seen = Vec::new();
    for _ in 0..5 {
        a.run(&["down"])?;
        a.run(&["up"])?;
        wait_for_peers(a, 1)?;
        let ping = a.icmp(b.address(true)?, &["-c", "1", "-W", "3"])?;
        seen.push(ping.worst);
    }
    println!("first replies after {seen:?} ms");
    ensure(seen.iter().all(|ms| *ms <= limit_ms), || format!("first replies after {seen:?} ms"))
}

fn is_relayed(a: &Node, b: &Node) -> Result<()> {
    let path = a.peer(&b.name)?.path;
    ensure(path.endpoint.is_some_and(|at| at.starts_with("https://")), || "it is not relayed".to_owned())
}

fn udp_blocked() -> Result<()> {
    let (internet, ra, rb) = gates()?;
    let world = world(internet, crate::world::URL, 8443)?;
    only(&ra, "iifname \"lan\" meta l4proto tcp accept")?;
    let nodes = world.join(&[("a", &ra.lan.host("a", 2)?), ("b", &rb.lan.host("b", 2)?)])?;
    first_replies(&nodes[0], &nodes[1], 300.0)?;
    first_replies(&nodes[1], &nodes[0], 300.0)
}

fn only_443() -> Result<()> {
    let (internet, ra, rb) = gates()?;
    let world = world(internet, "https://203.0.113.10", 443)?;
    only(&ra, "iifname \"lan\" tcp dport 443 accept")?;
    let nodes = world.join(&[("a", &ra.lan.host("a", 2)?), ("b", &rb.lan.host("b", 2)?)])?;
    first_replies(&nodes[0], &nodes[1], 500.0)?;
    is_relayed(&nodes[0], &nodes[1])?;
    let status = nodes[0].status()?;
    ensure(status.coordinator.relay.as_deref() == Some("websocket"), || format!("{:?}", status.coordinator))
}

/// Starts tinyproxy on a router, for its LAN.
fn tinyproxy(router: &Router, hosts: Option<&Path>) -> Result<String> {
    let address = router.lan.v4(1);
    let config = format!("/run/lab/{}-tinyproxy.conf", router.namespace.name());
    fs::write(
        &config,
        format!("Port 3128\nListen {address}\nTimeout 600\nMaxClients 100\nBasicAuth ann s3cret\nConnectPort 443\n"),
    )?;
    start(router, hosts, &["tinyproxy", "-d", "-c", &config])?;
    listens(router, &format!("{address}:3128"))?;
    Ok(format!("http://ann:s3cret@{address}:3128"))
}

/// The same with microsocks.
fn microsocks(router: &Router, hosts: Option<&Path>) -> Result<String> {
    let address = router.lan.v4(1);
    start(router, hosts, &["microsocks", "-i", &address, "-p", "1080", "-u", "ann", "-P", "s3cret"])?;
    listens(router, &format!("{address}:1080"))?;
    Ok(format!("socks5h://ann:s3cret@{address}:1080"))
}

/// Runs a program on a router, with an `/etc/hosts` of its own.
fn start(router: &Router, hosts: Option<&Path>, program: &[&str]) -> Result<()> {
    let mut command = match hosts {
        Some(hosts) => {
            let mut command = Command::new("unshare");
            let script = "mount --bind \"$1\" /etc/hosts && shift && exec \"$@\"";
            command.args(["--mount", "--", "sh", "-c", script, "sh"]).arg(hosts).args(program);
            command
        }
        None => {
            let mut command = Command::new(program[0]);
            command.args(&program[1..]);
            command
        }
    };
    inherit_nothing(&mut command);
    router.namespace.spawn(&mut command, Path::new("/run/lab/proxy.log")).map(drop)
}

fn listens(router: &Router, address: &str) -> Result<()> {
    let address = address.parse()?;
    until("the proxy listens", Duration::from_secs(10), || {
        let limit = Duration::from_secs(1);
        Ok(router.namespace.enter(|| TcpStream::connect_timeout(&address, limit))?.ok().map(drop))
    })
}

/// `meshd up` with a token, further arguments, and settings in the environment.
fn up(node: &Node, token: &str, args: &[&str], environment: &[(&str, &str)]) -> Result<Output> {
    let mut command = node.meshd(&[&["up", "--json", "--timeout", "15s", "--name", &node.name], args].concat());
    node.namespace.output(command.env("MESHD_TOKEN", token).envs(environment.iter().copied()))
}

fn succeeded(output: &Output) -> Result<()> {
    ensure(output.status.success(), || String::from_utf8_lossy(&output.stderr).into_owned())
}

/// It failed with this code, and said what to do.
fn refused(output: &Output, code: &str) -> Result<()> {
    ensure(!output.status.success(), || format!("{code}: it succeeded"))?;
    let error = error_of(output)?;
    println!("{}: {} | {}", error["code"], error["text"], error["hint"]);
    ensure(error["code"] == code && error["hint"].as_str().is_some_and(|h| h.len() > 10), || {
        format!("{code}: {error}")
    })?;
    no_secret("what it printed", &String::from_utf8_lossy(&output.stdout))?;
    no_secret("what it said", &String::from_utf8_lossy(&output.stderr))
}

fn no_secret(place: &str, text: &str) -> Result<()> {
    ensure(!text.contains("s3cret"), || format!("the proxy's password is in {place}: {text}"))
}

/// The password is in no log, status, argument, nor in a file others can read.
fn keeps_its_secret(node: &Node) -> Result<()> {
    no_secret("the log", &fs::read_to_string(node.state_dir().join("meshd.log"))?)?;
    no_secret("the status", &node.run(&["status"])?)?;
    no_secret("the status document", &node.run(&["status", "--json"])?)?;
    let arguments = fs::read(format!("/proc/{}/cmdline", node.pid()?))?;
    no_secret("the arguments", &String::from_utf8_lossy(&arguments))?;
    let file = node.state_dir().join("settings.json");
    let mode = fs::metadata(&file).context("settings.json")?.permissions().mode() & 0o777;
    ensure(mode == 0o600, || format!("{} has mode {mode:o}", file.display()))
}

fn only_http_proxy() -> Result<()> {
    if !installed("tinyproxy") {
        return skip("tinyproxy is not installed (apt-get install tinyproxy-bin)");
    }
    let (internet, ra, rb) = gates()?;
    let world = world(internet, "https://203.0.113.10", 443)?;
    only(&ra, "")?;
    let url = tinyproxy(&ra, None)?;
    let a = Node::new("a", ra.lan.host("a", 2)?);
    let b = Node::new("b", rb.lan.host("b", 2)?);
    b.up(&world.coordinator.claim()?)?;
    let token = b.invite()?;
    let bare = url.replace("ann:s3cret@", "");
    refused(&up(&a, &token, &["--proxy", &bare], &[])?, "proxy-auth-needed")?;
    refused(&up(&a, &token, &["--proxy", &bare.replace("//", "//bob:s3cret@")], &[])?, "proxy-auth-refused")?;
    fs::write("/run/lab/proxy-url", format!("{url}\n"))?;
    succeeded(&up(&a, &token, &["--proxy-file", "/run/lab/proxy-url"], &[])?)?;
    // It is remembered: a restart needs no word of it.
    first_replies(&a, &b, 500.0)?;
    is_relayed(&a, &b)?;
    keeps_its_secret(&a)?;
    let status = a.status()?.coordinator;
    ensure(status.connected && status.proxy.as_deref() == Some(bare.as_str()), || format!("{status:?}"))?;
    ensure(a.run(&["status"])?.contains(&bare), || "the table does not name the proxy".to_owned())?;
    a.run(&["down"])?;
    // In the foreground the argument would be seen for long.
    let mut foreground = a.meshd(&["up", "--foreground", "--proxy", &url]);
    let mut child = a.namespace.spawn(&mut foreground, Path::new("/run/lab/foreground.log"))?;
    until("the node is connected", Duration::from_secs(10), || {
        Ok(a.status().is_ok_and(|status| status.coordinator.connected).then_some(()))
    })?;
    keeps_its_secret(&a)?;
    no_secret("the log in the foreground", &fs::read_to_string("/run/lab/foreground.log")?)?;
    a.run(&["down"])?;
    child.wait()?;
    Ok(())
}

/// Neither machine can resolve the coordinator's name, nor send anything past its proxy.
fn only_proxies() -> Result<()> {
    if !installed("tinyproxy") || !installed("microsocks") {
        return skip("tinyproxy or microsocks is not installed (apt-get install tinyproxy-bin microsocks)");
    }
    let (internet, ra, rb) = gates()?;
    let machine = Node::new("coord", internet.host("coord", 10)?);
    let coordinator = Coordinator::start_with(machine, 443, &["--public-url", "https://vpn.lab.example"])?;
    let world = delays(internet, coordinator)?;
    only(&ra, "")?;
    only(&rb, "")?;
    let hosts = Path::new("/run/lab/hosts");
    fs::write(hosts, "203.0.113.10 vpn.lab.example\n")?;
    let (http, socks) = (tinyproxy(&ra, Some(hosts))?, microsocks(&rb, Some(hosts))?);
    let a = Node::new("a", ra.lan.host("a", 2)?);
    let b = Node::new("b", rb.lan.host("b", 2)?);
    succeeded(&up(&a, &world.coordinator.claim()?, &[], &[("MESHD_PROXY", &http)])?)?;
    let token = a.invite()?;
    let wrong = socks.replace("s3cret", "s3cret-not");
    refused(&up(&b, &token, &["--proxy", &wrong], &[])?, "proxy-auth-refused")?;
    refused(&up(&b, &token, &["--proxy", &socks.replace("ann:s3cret@", "")], &[])?, "proxy-auth-needed")?;
    succeeded(&up(&b, &token, &["--proxy", &socks], &[])?)?;
    wait_for_peers(&a, 1)?;
    first_replies(&a, &b, 500.0)?;
    is_relayed(&a, &b)?;
    first_replies(&b, &a, 500.0)?;
    keeps_its_secret(&a)?;
    keeps_its_secret(&b)?;
    eventually("status says that there is no STUN", Duration::from_secs(40), || {
        let health = a.status()?.health;
        ensure(health.iter().any(|line| line.code == "stun-unresolved"), || format!("{health:?}"))
    })
}

fn environment() -> Result<()> {
    let (internet, ra, rb) = gates()?;
    let world = world(internet, crate::world::URL, 8443)?;
    let proxy = Proxy::start(&ra.namespace, &ra.lan.v4(1), Does::Connect)?;
    let a = Node::new("a", ra.lan.host("a", 2)?);
    let b = Node::new("b", rb.lan.host("b", 2)?);
    b.up(&world.coordinator.claim()?)?;
    let token = b.invite()?;
    let nowhere = "http://192.168.21.1:9";
    refused(&up(&a, &token, &[], &[("HTTPS_PROXY", nowhere)])?, "proxy-unreachable")?;
    refused(&up(&a, &token, &[], &[("all_proxy", "socks4://ann:s3cret@h:1")])?, "proxy-url")?;
    refused(&up(&a, &token, &[], &[("HTTPS_PROXY", "http://no-such-proxy.invalid:1")])?, "proxy-dns")?;
    let through = |node: &Node| -> Result<Option<String>> { Ok(node.status()?.coordinator.proxy) };
    succeeded(&up(&a, &token, &[], &[("HTTPS_PROXY", nowhere), ("NO_PROXY", "example.org, 203.0.113.0/24")])?)?;
    ensure(through(&a)?.is_none(), || "NO_PROXY was not heeded".to_owned())?;
    a.run(&["down"])?;
    succeeded(&up(&a, "", &[], &[("HTTPS_PROXY", &proxy.url())])?)?;
    ensure(through(&a)? == Some(proxy.url()), || "HTTPS_PROXY was not heeded".to_owned())?;
    a.run(&["down"])?;
    // Said by the person, and for good.
    succeeded(&up(&a, "", &["--proxy", "none"], &[("HTTPS_PROXY", nowhere)])?)?;
    a.run(&["down"])?;
    succeeded(&up(&a, "", &[], &[("HTTPS_PROXY", nowhere)])?)?;
    ensure(a.status()?.coordinator.connected && through(&a)?.is_none(), || "none was forgotten".to_owned())?;
    a.run(&["down"])?;
    succeeded(&up(&a, "", &["--proxy", "auto"], &[("HTTPS_PROXY", &proxy.url())])?)?;
    ensure(through(&a)? == Some(proxy.url()), || "auto did not bring the environment back".to_owned())
}

/// What a proxy of our own does with a request.
#[derive(Debug, Clone, Copy)]
enum Does {
    Connect,
    Answer(&'static [u8]),
    Close,
    Hang,
}

/// A proxy that does as it is told.
struct Proxy {
    address: String,
    does: Arc<Mutex<Does>>,
    open: Arc<Mutex<Vec<TcpStream>>>,
}

impl Proxy {
    fn start(namespace: &Namespace, ip: &str, does: Does) -> Result<Self> {
        let address = format!("{ip}:3128");
        let listener = namespace.enter(|| TcpListener::bind(&address))??;
        let does = Arc::new(Mutex::new(does));
        let open = Arc::new(Mutex::new(Vec::new()));
        let (namespace, task, kept) = (namespace.clone(), Arc::clone(&does), Arc::clone(&open));
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let (namespace, does, kept) = (namespace.clone(), *task.lock().unwrap(), Arc::clone(&kept));
                std::thread::spawn(move || serve(client, &namespace, does, &kept));
            }
        });
        Ok(Self { address, does, open })
    }

    fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Does something else from now on, also to those that are connected: it ends those.
    fn turn(&self, does: Does) {
        *self.does.lock().unwrap() = does;
        for stream in self.open.lock().unwrap().drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

impl Proxy {
    /// How many connections there were since the last turn.
    fn connections(&self) -> usize {
        self.open.lock().unwrap().len()
    }

    /// Ends one connection, and does something else with those to come.
    fn cut(&self, which: usize, does: Does) {
        *self.does.lock().unwrap() = does;
        if let Some(stream) = self.open.lock().unwrap().get(which) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

fn serve(mut client: TcpStream, namespace: &Namespace, does: Does, open: &Mutex<Vec<TcpStream>>) -> Option<()> {
    if matches!(does, Does::Close) {
        return None;
    }
    let mut request = Vec::new();
    while !request.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        client.read_exact(&mut byte).ok()?;
        request.push(byte[0]);
    }
    open.lock().unwrap().push(client.try_clone().ok()?);
    match does {
        Does::Answer(answer) => client.write_all(answer).ok(),
        Does::Connect => {
            let text = String::from_utf8(request).ok()?;
            let target = text.strip_prefix("CONNECT ")?.split(' ').next()?.to_owned();
            let onward = namespace.enter(|| TcpStream::connect(&target)).ok()?.ok()?;
            client.write_all(b"HTTP/1.1 200 Connection established\r\n\r\n").ok()?;
            let (mut from, mut to) = (onward.try_clone().ok()?, client.try_clone().ok()?);
            std::thread::spawn(move || {
                let _ = std::io::copy(&mut from, &mut to);
                let _ = to.shutdown(Shutdown::Both);
            });
            let (mut from, mut to) = (client, onward);
            let _ = std::io::copy(&mut from, &mut to);
            to.shutdown(Shutdown::Both).ok()
        }
        Does::Close => None,
        Does::Hang => {
            // Until the client gives up.
            let mut rest = Vec::new();
            client.read_to_end(&mut rest).map(drop).ok()
        }
    }
}

const NEEDS_BASIC: Does =
    Does::Answer(b"HTTP/1.1 407 No\r\nProxy-Authenticate: Basic realm=\"x\"\r\nContent-Length: 0\r\n\r\n");
const NEEDS_NTLM: Does = Does::Answer(b"HTTP/1.1 407 No\r\nProxy-Authenticate: NTLM\r\nContent-Length: 0\r\n\r\n");
const FORBIDS: Does = Does::Answer(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n");
const NO_WAY: Does = Does::Answer(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n");
const BREAKS: Does = Does::Answer(b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n");
const GARBAGE: Does = Does::Answer(b"SSH-2.0-OpenSSH_9.9\r\n");
const SILENT_TUNNEL: Does = Does::Answer(b"HTTP/1.1 200 OK\r\n\r\n");

fn misbehaviour() -> Result<()> {
    let (internet, ra, rb) = gates()?;
    let world = world(internet, crate::world::URL, 8443)?;
    only(&ra, "")?;
    let proxy = Proxy::start(&ra.namespace, &ra.lan.v4(1), Does::Hang)?;
    let b = Node::new("b", rb.lan.host("b", 2)?);
    b.up(&world.coordinator.claim()?)?;
    let a = Node::new("a", ra.lan.host("a", 2)?);
    let token = b.invite()?;
    let (bare, full) = (proxy.url(), proxy.url().replace("//", "//ann:s3cret@"));
    for (does, url, code) in [
        (NEEDS_BASIC, &bare, "proxy-auth-needed"),
        (NEEDS_BASIC, &full, "proxy-auth-refused"),
        (NEEDS_NTLM, &full, "proxy-auth-unsupported"),
        (FORBIDS, &full, "proxy-forbidden"),
        (NO_WAY, &full, "proxy-no-way"),
        (BREAKS, &full, "proxy-refused"),
        (GARBAGE, &full, "not-a-proxy"),
        (Does::Close, &full, "proxy-closed"),
        (Does::Hang, &full, "proxy-timeout"),
        // It says that it connects, and then it does not.
        (SILENT_TUNNEL, &full, "coordinator-timeout"),
    ] {
        proxy.turn(does);
        refused(&up(&a, &token, &["--proxy", url], &[])?, code)?;
    }
    // As if it spoke SOCKS5: our HTTP proxy waits for the end of a head.
    proxy.turn(Does::Hang);
    refused(&up(&a, &token, &["--proxy", &bare.replace("http:", "socks5:")], &[])?, "proxy-timeout")?;
    refused(&up(&a, &token, &["--proxy", "http://192.168.21.1:9"], &[])?, "proxy-unreachable")?;
    refused(&up(&a, &token, &["--proxy", "https://ann:s3cret@192.168.21.1"], &[])?, "proxy-url")?;
    proxy.turn(Does::Connect);
    succeeded(&up(&a, &token, &["--proxy", &full], &[])?)
}

fn turns_bad() -> Result<()> {
    let (internet, ra, rb) = gates()?;
    let world = world(internet, crate::world::URL, 8443)?;
    only(&ra, "")?;
    let proxy = Proxy::start(&ra.namespace, &ra.lan.v4(1), Does::Connect)?;
    let b = Node::new("b", rb.lan.host("b", 2)?);
    b.up(&world.coordinator.claim()?)?;
    let a = Node::new("a", ra.lan.host("a", 2)?);
    succeeded(&up(&a, &b.invite()?, &["--proxy", &proxy.url().replace("//", "//ann:s3cret@")], &[])?)?;
    for (does, code) in [
        (NEEDS_BASIC, "proxy-auth-refused"),
        (FORBIDS, "proxy-forbidden"),
        (NO_WAY, "proxy-no-way"),
        (GARBAGE, "not-a-proxy"),
        (Does::Close, "proxy-closed"),
        (Does::Hang, "proxy-timeout"),
    ] {
        proxy.turn(does);
        let problem = eventually(&format!("status names {code}"), Duration::from_secs(20), || {
            let problem = a.status()?.coordinator.problem.context("no problem")?;
            ensure(problem.code == code && !problem.hint.is_empty(), || format!("{problem:?}"))?;
            Ok(problem)
        })?;
        eventually("the text says it too", Duration::from_secs(5), || {
            let text = a.run(&["status"])?;
            ensure(text.contains(&problem.text) && text.contains(&problem.hint), || text)
        })?;
        println!("{code}: {}", problem.text);
    }
    proxy.turn(Does::Connect);
    until("the node is connected again", Duration::from_secs(15), || {
        let coordinator = a.status()?.coordinator;
        Ok((coordinator.connected && coordinator.problem.is_none()).then_some(()))
    })?;
    keeps_its_secret(&a)?;
    let (code, pongs) = a.ping("b", &["-c", "2", "--interval", "200ms"])?;
    ensure(code == 0, || format!("{pongs:?}"))
}

/// Of the two links only the relay's is refused, as by a proxy that allows a client too few connections.
fn relay_refused() -> Result<()> {
    let (internet, ra, rb) = gates()?;
    let world = world(internet, crate::world::URL, 8443)?;
    only(&ra, "")?;
    let proxy = Proxy::start(&ra.namespace, &ra.lan.v4(1), Does::Connect)?;
    let b = Node::new("b", rb.lan.host("b", 2)?);
    b.up(&world.coordinator.claim()?)?;
    let a = Node::new("a", ra.lan.host("a", 2)?);
    succeeded(&up(&a, &b.invite()?, &["--proxy", &proxy.url()], &[])?)?;
    let links = || -> Result<(bool, bool)> {
        let coordinator = a.status()?.coordinator;
        Ok((coordinator.connected, coordinator.relay_connected))
    };
    // Which of the connections is whose is not known: all but the relay's are put right again.
    for which in 0..proxy.connections() {
        until("both links are up", Duration::from_secs(15), || Ok((links()? == (true, true)).then_some(())))?;
        proxy.cut(which, FORBIDS);
        let broke = || Ok((links()? != (true, true)).then_some(()));
        // The connection of the join has ended long ago.
        let none_broke = until("a link breaks", Duration::from_secs(3), broke).is_err();
        if none_broke || links()? != (true, false) {
            proxy.cut(usize::MAX, Does::Connect);
            continue;
        }
        let line = eventually("status names the relay's refusal", Duration::from_secs(15), || {
            let health = a.status()?.health;
            let line = health.iter().find(|line| line.code == "relay-unreachable" && line.text.contains("HTTP 403"));
            line.cloned().with_context(|| format!("{health:?}"))
        })?;
        println!("{}", line.text);
        let text = a.run(&["status"])?;
        return ensure(line.hint.contains("proxy") && text.contains(&line.text), || format!("{line:?} in\n{text}"));
    }
    anyhow::bail!("the relay link was never refused")
}
