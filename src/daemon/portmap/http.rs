//! The HTTP that routers speak: one request a connection, unencrypted, to the router's own address, of bounded size and time.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Duration;

use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpSocket, TcpStream};

use crate::wire::upnp::{MAX_DOCUMENT, Url};

/// How long one request may take in all.
const PATIENCE: Duration = Duration::from_secs(3);

/// Reads a document from this machine's address `own`.
///
/// # Errors
/// Why not, in words that go on from "the router refused: ".
pub(super) async fn get(own: Ipv4Addr, url: &Url) -> Result<String, String> {
    within(async {
        let (status, text) = exchange(own, url, "GET", None).await?;
        if status == StatusCode::OK { Ok(text) } else { Err(format!("its description is not there ({status})")) }
    })
    .await
}

/// Makes a call.
///
/// # Errors
/// As [`get`]. A fault comes as a document like any other answer.
pub(super) async fn post(own: Ipv4Addr, url: &Url, action: &str, body: String) -> Result<String, String> {
    within(async {
        let (status, text) = exchange(own, url, "POST", Some((action, body))).await?;
        // Faults come with 500 (SOAP 1.1 section 6.2).
        let usual = status == StatusCode::OK || status == StatusCode::INTERNAL_SERVER_ERROR;
        if usual { Ok(text) } else { Err(format!("its control page answers {status}")) }
    })
    .await
}

async fn within(work: impl Future<Output = Result<String, String>>) -> Result<String, String> {
    tokio::time::timeout(PATIENCE, work).await.unwrap_or_else(|_| Err("its web server hangs".to_owned()))
}

async fn exchange(
    own: Ipv4Addr,
    url: &Url,
    method: &str,
    call: Option<(&str, String)>,
) -> Result<(StatusCode, String), String> {
    let broken = |e: hyper::Error| format!("its web server answers no proper HTTP ({e})");
    let stream = connect(own, url).await.map_err(|e| format!("its web server cannot be reached ({e})"))?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
    let mut request = Request::builder()
        .method(method)
        .uri(url.path.as_str())
        .header("Host", url.address.to_string())
        .header("User-Agent", "meshd")
        .header("Connection", "close");
    let mut body = String::new();
    if let Some((action, text)) = call {
        request = request.header("SOAPAction", action).header("Content-Type", "text/xml; charset=\"utf-8\"");
        body = text;
    }
    let request = request
        .body(Full::new(Bytes::from(body)))
        .map_err(|e| format!("the address of its web server cannot be used ({e})"))?;
    let answer = async {
        let response = sender.send_request(request).await.map_err(broken)?;
        let status = response.status();
        let read = Limited::new(response.into_body(), MAX_DOCUMENT).collect().await;
        let bytes = read.map_err(|e| format!("its answer cannot be read ({e})"))?.to_bytes();
        // A router that writes its name in Latin-1 is not to fail for that.
        Ok((status, String::from_utf8_lossy(&bytes).into_owned()))
    };
    tokio::pin!(answer);
    tokio::select! {
        done = &mut answer => done,
        // The connection's end may come before the last bytes were taken.
        _ = connection => answer.await,
    }
}

async fn connect(own: Ipv4Addr, url: &Url) -> std::io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    crate::os::mark::mark(&socket);
    socket.bind(SocketAddrV4::new(own, 0).into())?;
    socket.connect(url.address.into()).await
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    use super::*;

    /// A web server that says `answer` once, after it read the head of the request; what it read.
    async fn server(answer: Vec<u8>) -> (Url, tokio::task::JoinHandle<String>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let std::net::SocketAddr::V4(address) = listener.local_addr().unwrap() else { unreachable!() };
        let served = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut head = vec![0; 4_096];
            let length = stream.read(&mut head).await.unwrap();
            // A reader that had enough closes early.
            let _ = stream.write_all(&answer).await;
            String::from_utf8_lossy(&head[..length]).into_owned()
        });
        (Url { address, path: "/d.xml?a=b".into() }, served)
    }

    #[tokio::test]
    async fn documents_come_whole_in_pieces_or_until_the_end() {
        for answer in [
            "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n<a/>",
            "HTTP/1.0 200 OK\r\n\r\n<a/>",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n<a\r\n2\r\n/>\r\n0\r\n\r\n",
        ] {
            let (url, served) = server(answer.into()).await;
            assert_eq!(get(Ipv4Addr::LOCALHOST, &url).await.unwrap(), "<a/>", "{answer}");
            let request = served.await.unwrap();
            assert!(request.starts_with("GET /d.xml?a=b HTTP/1.1\r\n"), "{request}");
            assert!(request.to_lowercase().contains("host: 127.0.0.1:"), "{request}");
        }
    }

    #[tokio::test]
    async fn a_fault_is_an_answer_and_other_errors_are_not() {
        let (url, served) = server("HTTP/1.1 500 Error\r\nContent-Length: 4\r\n\r\n<f/>".into()).await;
        assert_eq!(post(Ipv4Addr::LOCALHOST, &url, "\"x#y\"", "<b/>".into()).await.unwrap(), "<f/>");
        let request = served.await.unwrap();
        assert!(request.to_lowercase().contains("soapaction: \"x#y\"\r\n"), "{request}");
        let (url, _) = server("HTTP/1.1 404 Gone\r\nContent-Length: 0\r\n\r\n".into()).await;
        assert!(get(Ipv4Addr::LOCALHOST, &url).await.unwrap_err().contains("404"));
        let (url, _) = server("nonsense\r\n\r\n".into()).await;
        assert!(get(Ipv4Addr::LOCALHOST, &url).await.unwrap_err().contains("no proper HTTP"));
    }

    #[tokio::test]
    async fn a_document_without_end_is_not_read() {
        let mut endless = b"HTTP/1.1 200 OK\r\n\r\n".to_vec();
        endless.resize(MAX_DOCUMENT * 2, b'a');
        let (url, _) = server(endless).await;
        assert!(get(Ipv4Addr::LOCALHOST, &url).await.unwrap_err().contains("cannot be read"));
    }
}
