//! Links through proxies over loopback, and proxies that do something else instead.

use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::TcpStream;

use super::*;
use crate::link::tests::{COORDINATOR, Node, Note, note, one_connection, serve_control, within};
use crate::link::{ControlLink, Target, connect_control};

/// A name that no resolver knows: only the proxy does.
const URL: &str = "http://coordinator.invalid:8443";

fn proxies(scheme: &str, credentials: &str, at: SocketAddr) -> Proxies {
    let setting = ProxySetting::parse(&format!("{scheme}://{credentials}{at}")).unwrap();
    Proxies::new(setting, &Environment::default()).unwrap()
}

async fn connect(proxies: &Proxies) -> Result<ControlLink, ConnectError> {
    let node = Node::new();
    let target = Target { proxies, ..node.target(URL.to_owned(), COORDINATOR) };
    within(connect_control(&target)).await
}

/// Reads the head of a request.
async fn head(tcp: &mut TcpStream) -> String {
    let mut text = Vec::new();
    while !text.ends_with(b"\r\n\r\n") {
        text.push(tcp.read_u8().await.unwrap());
    }
    String::from_utf8(text).unwrap()
}

/// Both ends hear each other.
async fn talks(node: ControlLink, coordinator: ControlLink) {
    let ((mut tx, mut rx), (mut other_tx, mut other_rx)) = (node.split(), coordinator.split());
    tx.send(&note("there")).await.unwrap();
    assert_eq!(within(other_rx.recv()).await, Ok(Some(note("there"))));
    other_tx.send(&note("and back")).await.unwrap();
    assert_eq!(within(rx.recv::<Note>()).await, Ok(Some(note("and back"))));
}

#[tokio::test]
async fn a_link_goes_through_an_http_proxy_that_resolves_the_name() {
    let (coordinator, server) = one_connection(serve_control).await;
    let (at, _proxy) = one_connection(move |mut tcp| async move {
        let asked = head(&mut tcp).await;
        assert!(asked.starts_with("CONNECT coordinator.invalid:8443 HTTP/1.1\r\n"), "{asked}");
        assert!(asked.contains("Proxy-Authorization: Basic YW5uOnNlY3JldA==\r\n"), "{asked}");
        let mut onward = TcpStream::connect(coordinator).await.unwrap();
        tcp.write_all(b"HTTP/1.1 200 Connection established\r\n\r\n").await.unwrap();
        let _ = copy_bidirectional(&mut tcp, &mut onward).await;
    })
    .await;
    let node = connect(&proxies("http", "ann:secret@", at)).await.unwrap();
    talks(node, within(server).await.unwrap().unwrap().1).await;
}

#[tokio::test]
async fn a_link_goes_through_a_socks5_proxy_that_resolves_the_name() {
    let (coordinator, server) = one_connection(serve_control).await;
    let (at, _proxy) = one_connection(move |mut tcp| async move {
        let mut greeting = [0; 4];
        tcp.read_exact(&mut greeting).await.unwrap();
        assert_eq!(greeting, [5, 2, 0, 2]);
        tcp.write_all(&[5, 2]).await.unwrap();
        let mut auth = [0; 12];
        tcp.read_exact(&mut auth).await.unwrap();
        assert_eq!(&auth, b"\x01\x03ann\x06secret");
        tcp.write_all(&[1, 0]).await.unwrap();
        let mut request = [0; 26];
        tcp.read_exact(&mut request).await.unwrap();
        assert_eq!(&request[..5], [5, 1, 0, 3, 19]);
        assert_eq!(&request[5..24], b"coordinator.invalid");
        let mut onward = TcpStream::connect(coordinator).await.unwrap();
        tcp.write_all(&[5, 0, 0, 1, 127, 0, 0, 1, 0, 1]).await.unwrap();
        let _ = copy_bidirectional(&mut tcp, &mut onward).await;
    })
    .await;
    let node = connect(&proxies("socks5h", "ann:secret@", at)).await.unwrap();
    talks(node, within(server).await.unwrap().unwrap().1).await;
}

/// What a proxy does that answers this to the first bytes it gets, and then closes.
async fn failure(scheme: &str, credentials: &str, answer: &'static [u8]) -> ConnectError {
    let (at, _proxy) = one_connection(move |mut tcp| async move {
        let mut asked = [0; 2048];
        let _ = tcp.read(&mut asked).await;
        tcp.write_all(answer).await.unwrap();
        let _ = tcp.shutdown().await;
        // Not reset before it was read.
        while tcp.read(&mut asked).await.is_ok_and(|n| n > 0) {}
    })
    .await;
    connect(&proxies(scheme, credentials, at)).await.unwrap_err()
}

#[tokio::test]
async fn what_a_proxy_does_instead_is_named_without_the_password() {
    let needs: &[u8] = b"HTTP/1.1 407 No\r\nProxy-Authenticate: Basic realm=\"x\"\r\nContent-Length: 0\r\n\r\n";
    for (scheme, credentials, answer, code) in [
        ("http", "", needs, "proxy-auth-needed"),
        ("http", "ann:secret@", needs, "proxy-auth-refused"),
        ("http", "ann:secret@", b"HTTP/1.1 407 No\r\nProxy-Authenticate: NTLM\r\n\r\n", "proxy-auth-unsupported"),
        ("http", "ann:secret@", b"HTTP/1.1 403 Forbidden\r\n\r\nno", "proxy-forbidden"),
        ("http", "", b"HTTP/1.1 502 Bad Gateway\r\n\r\n", "proxy-no-way"),
        ("http", "", b"HTTP/1.1 500 Oops\r\n\r\n", "proxy-refused"),
        ("http", "", b"", "proxy-closed"),
        ("http", "ann:secret@", b"\x05\xff", "not-a-proxy"),
        ("socks5", "", b"\x05\xff", "proxy-auth-needed"),
        ("socks5", "", b"", "proxy-closed"),
        ("socks5", "ann:secret@", b"HTTP/1.1 400 Bad Request\r\n\r\n", "not-a-proxy"),
    ] {
        let error = failure(scheme, credentials, answer).await;
        assert_eq!(error.code(), code, "{error}");
        let shown = format!("{error} {error:?} {}", error.hint());
        assert!(!shown.contains("secret") && !shown.contains("ann:"), "{shown}");
        assert!(shown.contains(scheme) && !error.hint().is_empty() && error.may_pass(), "{shown}");
    }
}

#[tokio::test]
async fn a_proxy_that_is_not_there_or_has_no_address_is_named() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    drop(listener);
    let error = connect(&proxies("http", "", at)).await.unwrap_err();
    assert_eq!(error.code(), "proxy-unreachable", "{error}");
    let setting = ProxySetting::parse(&format!("http://{}.invalid:1", "a".repeat(64))).unwrap();
    let error = connect(&Proxies::new(setting, &Environment::default()).unwrap()).await.unwrap_err();
    assert_eq!(error.code(), "proxy-dns", "{error}");
}

#[tokio::test]
async fn errors_behind_a_proxy_say_so() {
    let (at, _proxy) = one_connection(move |mut tcp| async move {
        head(&mut tcp).await;
        tcp.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
        head(&mut tcp).await;
        tcp.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n").await.unwrap();
    })
    .await;
    let error = connect(&proxies("http", "", at)).await.unwrap_err();
    assert_eq!(error.code(), "not-a-coordinator", "{error}");
    assert!(error.to_string().contains(&format!("(through the proxy http://{at})")), "{error}");
}
