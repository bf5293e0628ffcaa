//! A web page behind a node, and the fetching of it. Just enough HTTP/1.0 for the demonstration.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd as _;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

const PATIENCE: Duration = Duration::from_secs(10);
/// More of a request or page than this is not read.
const LIMIT: u64 = 16 << 10;

/// Answers one request on `listener` with `page`. Waits ten seconds for it.
pub(super) fn serve_once(listener: &TcpListener, page: &str) -> Result<()> {
    let mut ready = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
    if poll(&mut ready, PollTimeout::try_from(PATIENCE)?)? == 0 {
        bail!("nobody asked for the page");
    }
    let (mut stream, _) = listener.accept()?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut request = Vec::new();
    let mut byte = [0; 1];
    while !request.ends_with(b"\r\n\r\n") && (request.len() as u64) < LIMIT {
        if stream.read(&mut byte)? == 0 {
            break;
        }
        request.extend(byte);
    }
    let head = format!("HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {}\r\n\r\n", page.len());
    stream.write_all(head.as_bytes())?;
    stream.write_all(page.as_bytes())?;
    Ok(())
}

/// Fetches `/` from a server.
pub(super) fn fetch(server: SocketAddr) -> Result<String> {
    let mut stream =
        TcpStream::connect_timeout(&server, PATIENCE).with_context(|| format!("cannot connect to {server}"))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(format!("GET / HTTP/1.0\r\nHost: {server}\r\n\r\n").as_bytes())?;
    let mut answer = String::new();
    stream.take(LIMIT).read_to_string(&mut answer)?;
    match answer.split_once("\r\n\r\n") {
        Some((head, page)) if head.starts_with("HTTP/1.0 200") => Ok(page.to_owned()),
        _ => bail!("{server} answered with something else than a page"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_arrives() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let server = listener.local_addr().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| serve_once(&listener, "hello\n"));
            assert_eq!(fetch(server).unwrap(), "hello\n");
        });
    }
}
