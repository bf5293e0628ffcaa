//! Services behind a node: a web page, and an echo. They last as long as the case's process.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use anyhow::{Context as _, Result};
use meshd::cli::demo::net::Namespace;

const PATIENCE: Duration = Duration::from_secs(3);

/// Answers every connection with `page` and the address it comes from.
pub fn web(machine: &Namespace, at: SocketAddr, page: &str) -> Result<()> {
    let listener = machine.enter(|| TcpListener::bind(at))??;
    let page = page.to_owned();
    let work = move || {
        for stream in listener.incoming().flatten() {
            let from = stream.peer_addr().map(|a| a.ip().to_canonical().to_string()).unwrap_or_default();
            // Whoever went away is no concern of the server's.
            let _ = answer(stream, &format!("{page} {from}"));
        }
    };
    std::thread::Builder::new().name("web".to_owned()).spawn(work).map(drop).context("no thread")
}

fn answer(mut stream: TcpStream, page: &str) -> Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut request = [0; 1_024];
    let _ = stream.read(&mut request)?;
    write!(stream, "HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n{page}", page.len())?;
    Ok(())
}

/// Fetches a page; what it says, and what address the server saw.
pub fn fetch(machine: &Namespace, server: SocketAddr) -> Result<(String, String)> {
    let text = machine.enter(|| -> Result<String> {
        let mut stream = TcpStream::connect_timeout(&server, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        write!(stream, "GET / HTTP/1.0\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    })??;
    let page = text.split_once("\r\n\r\n").map(|(_, page)| page).context("no page")?;
    let (page, from) = page.rsplit_once(' ').context("no address in the page")?;
    Ok((page.to_owned(), from.to_owned()))
}

/// Sends every datagram back.
pub fn echo(machine: &Namespace, at: SocketAddr) -> Result<()> {
    let socket = machine.enter(|| UdpSocket::bind(at))??;
    let work = move || {
        let mut buffer = [0; 2_048];
        while let Ok((length, from)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(&buffer[..length], from);
        }
    };
    std::thread::Builder::new().name("echo".to_owned()).spawn(work).map(drop).context("no thread")
}

/// Sends a stream of datagrams to an echo, one after the other; how many came back.
pub fn stream(machine: &Namespace, to: SocketAddr, datagrams: usize) -> Result<usize> {
    machine.enter(|| -> Result<usize> {
        let socket = UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })?;
        socket.connect(to)?;
        socket.set_read_timeout(Some(Duration::from_millis(500)))?;
        let mut back = 0;
        let mut buffer = [0; 2_048];
        for _ in 0..datagrams {
            socket.send(&[7; 1_000])?;
            back += usize::from(matches!(socket.recv(&mut buffer), Ok(1_000)));
        }
        Ok(back)
    })?
}
