//! Questions about other names, passed on as they are to the servers the system had before.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::timeout;

use crate::engine::names::Transport;

/// How long a server may take before the next is asked; a C library gives up after five seconds in all.
const PATIENCE: Duration = Duration::from_millis(1_500);
/// How many servers are asked: as many as a C library asks (resolv.conf(5), MAXNS).
const SERVERS: usize = 3;
/// The longest answer in a datagram that is passed on.
const DATAGRAM: usize = 4_096;

/// The first answer any of `servers` gives, asked one after the other. `None`: none answers.
pub(super) async fn ask(servers: &[IpAddr], question: &[u8], transport: Transport) -> Option<Vec<u8>> {
    for server in servers.iter().take(SERVERS) {
        let server = SocketAddr::new(*server, 53);
        let asked = async {
            match transport {
                Transport::Udp => by_udp(server, question).await,
                Transport::Tcp => by_tcp(server, question).await,
            }
        };
        match timeout(PATIENCE, asked).await {
            Ok(Ok(answer)) => return Some(answer),
            Ok(Err(e)) => tracing::debug!(%server, error = %e, "a name server cannot be asked"),
            Err(_) => tracing::debug!(%server, "a name server does not answer"),
        }
    }
    None
}

/// A socket for each question: its random port is half of what a forger has to guess (RFC 5452 section 9.2).
async fn by_udp(server: SocketAddr, question: &[u8]) -> io::Result<Vec<u8>> {
    let any: IpAddr = if server.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(server).await?;
    socket.send(question).await?;
    let mut buffer = vec![0; DATAGRAM];
    loop {
        let length = socket.recv(&mut buffer).await?;
        if is_answer(&buffer[..length], question) {
            buffer.truncate(length);
            return Ok(buffer);
        }
    }
}

async fn by_tcp(server: SocketAddr, question: &[u8]) -> io::Result<Vec<u8>> {
    let length = u16::try_from(question.len()).map_err(io::Error::other)?;
    let mut stream = TcpStream::connect(server).await?;
    let mut framed = length.to_be_bytes().to_vec();
    framed.extend_from_slice(question);
    stream.write_all(&framed).await?;
    let mut answer = vec![0; usize::from(stream.read_u16().await?)];
    stream.read_exact(&mut answer).await?;
    if is_answer(&answer, question) { Ok(answer) } else { Err(io::ErrorKind::InvalidData.into()) }
}

/// An answer, and to this question: the same number and the same text of the question.
fn is_answer(answer: &[u8], question: &[u8]) -> bool {
    let (Some(a), Some(q)) = (answer.first_chunk::<12>(), question.first_chunk::<12>()) else { return false };
    // The name and its type and class follow the header; what follows them in the question (EDNS) is not repeated.
    let asked = question_end(question).and_then(|end| question.get(12..end));
    a[..2] == q[..2]
        && a[2] & 0x80 != 0
        && asked.is_some_and(|asked| answer.get(12..12 + asked.len()).is_some_and(|a| a.eq_ignore_ascii_case(asked)))
}

/// Where the first question ends: labels to the empty one, then type and class.
fn question_end(message: &[u8]) -> Option<usize> {
    let mut at = 12;
    loop {
        let length = usize::from(*message.get(at)?);
        if length == 0 {
            return Some(at + 5);
        }
        // A pointer has no place in a question.
        if length > 63 {
            return None;
        }
        at += length + 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUESTION: &[u8] = b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x07example\x03org\x00\x00\x01\x00\x01";

    #[test]
    fn only_an_answer_to_this_very_question_is_passed_on() {
        let mut answer = QUESTION.to_vec();
        answer[2] |= 0x80;
        assert!(is_answer(&answer, QUESTION));
        answer[13] = b'E';
        assert!(is_answer(&answer, QUESTION), "case does not count");
        assert!(!is_answer(QUESTION, QUESTION), "a question is no answer");
        let mut other = answer.clone();
        other[0] = 0;
        assert!(!is_answer(&other, QUESTION), "another number");
        other.clone_from(&answer);
        other[14] = b'f';
        assert!(!is_answer(&other, QUESTION), "another name");
        assert!(
            !is_answer(&answer[..20], QUESTION) && !is_answer(b"", QUESTION) && !is_answer(&answer, &QUESTION[..15])
        );
    }
}
