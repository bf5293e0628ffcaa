//! STUN over TCP (RFC 8489 section 6.2.2) on the coordinator's TCP port, told from TLS and HTTP by the first byte: a node without
//! UDP learns how its TCP port is seen from outside, and keeps the connection for as long as its NAT's mapping is to last.
//!
//! One message a turn, of bounded length; no more than a few on a connection. Only Binding is answered.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::wire::stun::{self, HEADER, ServerLayout};

/// STUN messages begin with two zero bits and the upper bits of the kind, which for a Binding request are zero. TLS begins with
/// 22, HTTP with a letter.
pub(super) const FIRST_BYTE: u8 = 0;
/// The longest request.
const LONGEST: usize = 548;
/// Requests on one connection: one every twenty seconds for a quarter of an hour.
const REQUESTS: usize = 45;
/// From one request to the next.
const IDLE: Duration = Duration::from_secs(60);

/// Answers until the other side is done, or does something else.
pub(super) async fn serve(mut stream: TcpStream, from: SocketAddr, local: SocketAddr) {
    let layout = ServerLayout { endpoints: vec![local] };
    for _ in 0..REQUESTS {
        let Ok(Some(request)) = timeout(IDLE, read(&mut stream)).await else { return };
        // Other addresses and ports are of no use in a connection.
        let answer = stun::answer(&request, from, local, &layout).filter(|answer| answer.port == from.port());
        let Some(answer) = answer else { return };
        if !matches!(timeout(IDLE, stream.write_all(&answer.bytes)).await, Ok(Ok(()))) {
            return;
        }
    }
}

/// One message: its header says how long it is.
async fn read(stream: &mut TcpStream) -> Option<Vec<u8>> {
    let mut message = vec![0; HEADER];
    stream.read_exact(&mut message).await.ok()?;
    let len = HEADER + usize::from(u16::from_be_bytes([message[2], message[3]]));
    if message.first() != Some(&FIRST_BYTE) || len > LONGEST {
        return None;
    }
    message.resize(len, 0);
    stream.read_exact(&mut message[HEADER..]).await.ok()?;
    Some(message)
}
