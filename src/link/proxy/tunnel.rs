//! A TCP connection through a proxy.

use std::io;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::link::connect::{Dial, dial};
use crate::link::error::{ConnectError, plainly};
use crate::link::proxy::Proxy;
use crate::link::proxy::failure::ProxyFailure;
use crate::link::proxy::handshake::{Handshake, Step};

/// From the first packet to the proxy until it passes bytes on. Shorter than what a try may take in all, so that the proxy
/// and not the coordinator is named.
const PATIENCE: Duration = Duration::from_secs(4);
/// What is being waited for; in between `dial` has a word of its own.
const RESOLVING: &str = "resolving its name";
const CONVERSING: &str = "talking to it";
/// Bytes read at once.
const READ: usize = 2048;

/// Connects to `host` through the proxy.
///
/// # Errors
/// [`ConnectError::Proxy`], within four seconds.
pub(in crate::link) async fn through(proxy: &Proxy, host: &str, port: u16) -> Result<TcpStream, ConnectError> {
    let mut stage = RESOLVING;
    let steps = async {
        let mut tcp = dial(&proxy.host, proxy.port, &mut stage).await.map_err(|e| match e {
            Dial::Dns(cause) => ProxyFailure::NameUnknown(cause),
            Dial::Unreachable(_, cause) => ProxyFailure::Unreachable(cause),
        })?;
        stage = CONVERSING;
        converse(&mut tcp, proxy, host, port).await?;
        Ok(tcp)
    };
    let failure = match timeout(PATIENCE, steps).await {
        Ok(Ok(tcp)) => return Ok(tcp),
        Ok(Err(failure)) => failure,
        Err(_) => {
            let how = format!("no answer within {} s", PATIENCE.as_secs());
            match stage {
                RESOLVING => ProxyFailure::NameUnknown(how),
                CONVERSING => ProxyFailure::Silent,
                _ => ProxyFailure::Unreachable(how),
            }
        }
    };
    let target = super::authority(host, port, host.contains(':'));
    Err(ConnectError::Proxy { proxy: proxy.to_string(), target, failure })
}

async fn converse(tcp: &mut TcpStream, proxy: &Proxy, host: &str, port: u16) -> Result<(), ProxyFailure> {
    let (mut handshake, first) = Handshake::start(proxy, host, port)?;
    let mut buffer = [0; READ];
    let mut next = Some(first);
    loop {
        if let Some(bytes) = next.take() {
            tcp.write_all(&bytes).await.map_err(|e| cut(&e))?;
        }
        let step = match tcp.read(&mut buffer).await {
            Ok(0) => return Err(handshake.closed()),
            Ok(n) => handshake.receive(buffer.get(..n).unwrap_or_default())?,
            Err(e) => return Err(cut(&e)),
        };
        match step {
            Step::More => {}
            Step::Send(bytes) => next = Some(bytes),
            Step::Done => return Ok(()),
        }
    }
}

fn cut(e: &io::Error) -> ProxyFailure {
    ProxyFailure::Closed(plainly(e))
}
