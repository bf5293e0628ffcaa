//! The node's end against the coordinator's end over loopback, and against things that are no coordinator.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_tungstenite::tungstenite::Message;

use super::accept::accept;
use super::connect::establish;
use super::*;
use crate::trust::keys::Secret32;
use crate::wire::control::MAX_MESSAGE;
use crate::wire::version::VersionRange;

pub(super) const COORDINATOR: [u8; 32] = [2; 32];
const NODE: [u8; 32] = [1; 32];
const DEADLINE: Duration = Duration::from_secs(20);

#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Note {
    text: String,
}

pub(super) fn note(text: &str) -> Note {
    Note { text: text.into() }
}

/// Serves one TCP connection with `serve`.
pub(super) async fn one_connection<F, R>(
    serve: impl FnOnce(TcpStream) -> F + Send + 'static,
) -> (SocketAddr, JoinHandle<R>)
where
    F: Future<Output = R> + Send + 'static,
    R: Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let task = tokio::spawn(async move { serve(listener.accept().await.unwrap().0).await });
    (address, task)
}

/// The WebSocket upgrade, without which nothing else begins. The node is silent until it has the answer, so nothing can
/// be lost in a buffer here.
async fn upgraded(tcp: TcpStream) -> TcpStream {
    tokio_tungstenite::accept_async(tcp).await.unwrap().into_inner()
}

pub(super) async fn serve_control(tcp: TcpStream) -> Result<(Peer, ControlLink), AcceptError> {
    accept_control(upgraded(tcp).await, &Secret32::new(COORDINATOR), (None, None)).await
}

pub(super) async fn within<T>(what: impl Future<Output = T>) -> T {
    timeout(DEADLINE, what).await.expect("took too long")
}

pub(super) struct Node {
    secret: Secret32,
}

impl Node {
    pub(super) fn new() -> Self {
        Self { secret: Secret32::new(NODE) }
    }

    pub(super) fn target(&self, url: String, key: [u8; 32]) -> Target<'_> {
        Target {
            url,
            coordinator: public_key(&Secret32::new(key)),
            secret: &self.secret,
            proxies: &proxy::DIRECT,
            timeout: Duration::from_secs(8),
        }
    }

    async fn control(&self, address: SocketAddr) -> Result<ControlLink, ConnectError> {
        connect_control(&self.target(format!("http://{address}"), COORDINATOR)).await
    }
}

/// TLS with a certificate for another name.
fn self_made() -> rustls::ServerConfig {
    let made = rcgen::generate_simple_self_signed(vec!["somewhere.else".into()]).unwrap();
    let key = rustls::pki_types::PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
    rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key)
        .unwrap()
}

/// Both ends of a control link.
async fn pair() -> (ControlLink, ControlLink) {
    let (address, server) = one_connection(serve_control).await;
    let node = within(Node::new().control(address)).await.unwrap();
    let (peer, coordinator) = within(server).await.unwrap().unwrap();
    assert_eq!(peer.key, public_key(&Secret32::new(NODE)));
    (node, coordinator)
}

#[tokio::test]
async fn control_messages_cross_both_ways_and_unreadable_ones_are_skipped() {
    let (node, coordinator) = pair().await;
    assert_eq!((node.info().version, node.info().program.as_str()), (1, env!("CARGO_PKG_VERSION")));
    assert!(node.info().peer_addr.is_some() && node.info().local_addr.is_some());
    let ((mut node_tx, mut node_rx), (mut coord_tx, mut coord_rx)) = (node.split(), coordinator.split());
    let long = note(&"x".repeat(MAX_MESSAGE - 100));
    node_tx.send(&note("hello")).await.unwrap();
    node_tx.send(&[1, 2, 3]).await.unwrap();
    node_tx.send(&long).await.unwrap();
    assert_eq!(within(coord_rx.recv()).await, Ok(Some(note("hello"))));
    assert_eq!(within(coord_rx.recv()).await, Ok(Some(long)));
    assert_eq!(coord_rx.skipped(), 1);
    coord_tx.send(&note("welcome")).await.unwrap();
    assert_eq!(within(node_rx.recv()).await, Ok(Some(note("welcome"))));
    assert_eq!(node_tx.send(&note(&"x".repeat(MAX_MESSAGE))).await, Err(LinkError::TooLong));
    node_tx.send(&note("still up")).await.unwrap();
    assert_eq!(within(coord_rx.recv()).await, Ok(Some(note("still up"))));
}

#[tokio::test]
async fn a_full_queue_makes_the_sender_wait_and_loses_nothing() {
    let (node, coordinator) = pair().await;
    let ((mut tx, _node_rx), (_coord_tx, mut rx)) = (node.split(), coordinator.split());
    let sender = tokio::spawn(async move {
        for i in 0..2_000 {
            tx.send(&note(&i.to_string())).await.unwrap();
        }
        tx
    });
    for i in 0..2_000 {
        assert_eq!(within(rx.recv()).await, Ok(Some(note(&i.to_string()))));
    }
    within(sender).await.unwrap();
}

#[tokio::test]
async fn closing_says_why() {
    let (node, coordinator) = pair().await;
    let ((_node_tx, mut node_rx), (mut coord_tx, _coord_rx)) = (node.split(), coordinator.split());
    coord_tx.send(&note("last words")).await.unwrap();
    coord_tx.close(close::NOT_A_MEMBER, "this node was removed").await;
    assert_eq!(within(node_rx.recv()).await, Ok(Some(note("last words"))));
    let why = LinkError::Closed { code: close::NOT_A_MEMBER, reason: "this node was removed".into() };
    assert_eq!(within(node_rx.recv::<Note>()).await, Err(why));
}

#[tokio::test]
async fn dropping_either_half_ends_the_link_for_both() {
    for drop_sender in [true, false] {
        let (node, coordinator) = pair().await;
        let ((tx, rx), (_coord_tx, mut coord_rx)) = (node.split(), coordinator.split());
        let _other_half: Box<dyn std::any::Any> = if drop_sender {
            drop(tx);
            Box::new(rx)
        } else {
            drop(rx);
            Box::new(tx)
        };
        assert_eq!(within(coord_rx.recv::<Note>()).await, Ok(None), "drop_sender={drop_sender}");
    }
}

#[tokio::test]
async fn relay_messages_cross_over_tls_with_any_certificate() {
    let config = self_made();
    let (address, server) = one_connection(|tcp| async move {
        let tls = TlsAcceptor::from(Arc::new(config)).accept(tcp).await.unwrap();
        let stream = tokio_tungstenite::accept_async(tls).await.unwrap().into_inner();
        accept_relay(stream, &Secret32::new(COORDINATOR), (None, None)).await.unwrap()
    })
    .await;
    let node = Node::new();
    let link = within(connect(&node.target(format!("https://{address}"), COORDINATOR), Purpose::Relay)).await.unwrap();
    let Connected::Relay(link) = link else { panic!("asked for a relay link") };
    let (peer, served) = within(server).await.unwrap();
    assert_eq!(peer.key, public_key(&Secret32::new(NODE)));
    let ((mut tx, _rx), (_served_tx, mut served_rx)) = (link.split(), served.split());
    tx.send(vec![7; MAX_RELAY_MESSAGE]).await.unwrap();
    assert_eq!(within(served_rx.recv()).await.unwrap().unwrap(), vec![7; MAX_RELAY_MESSAGE]);
    assert_eq!(tx.send(vec![7; MAX_RELAY_MESSAGE + 1]).await, Err(LinkError::TooLong));
}

#[tokio::test]
async fn a_tls_connection_that_is_cut_off_is_said_plainly() {
    let config = self_made();
    let (address, server) = one_connection(|tcp| async move {
        // The system closes it, as when the process is killed: TLS does not say goodbye.
        let cutter = socket2::SockRef::from(&tcp).try_clone().unwrap();
        let tls = TlsAcceptor::from(Arc::new(config)).accept(tcp).await.unwrap();
        let stream = tokio_tungstenite::accept_async(tls).await.unwrap().into_inner();
        let link = accept_control(stream, &Secret32::new(COORDINATOR), (None, None)).await.unwrap();
        cutter.shutdown(std::net::Shutdown::Both).unwrap();
        link
    })
    .await;
    let node = Node::new();
    let link = within(connect_control(&node.target(format!("https://{address}"), COORDINATOR))).await.unwrap();
    let (_tx, mut rx) = link.split();
    let _served = within(server).await.unwrap();
    assert_eq!(within(rx.recv::<Note>()).await, Err(LinkError::Broken("it was cut off".into())));
}

#[tokio::test]
async fn a_coordinator_with_another_key_is_told_apart() {
    let (address, server) = one_connection(serve_control).await;
    let node = Node::new();
    let error = within(connect_control(&node.target(format!("http://{address}"), [9; 32]))).await.unwrap_err();
    assert_eq!(error.code(), "coordinator-wrong-key", "{error}");
    assert_eq!(error.to_string(), format!("the coordinator at {address} does not have the key in the token"));
    assert!(!error.may_pass());
    assert_eq!(within(server).await.unwrap().err(), Some(AcceptError::WrongKey));
}

#[tokio::test]
async fn an_impostor_that_answers_anything_at_all_is_not_believed() {
    let (address, _server) = one_connection(|tcp| async move {
        let mut ws = tokio_tungstenite::accept_async(tcp).await.unwrap();
        let _ = ws.next().await;
        ws.send(Message::Binary(vec![0; 96].into())).await.unwrap();
        ws
    })
    .await;
    let error = within(Node::new().control(address)).await.unwrap_err();
    assert_eq!(error.code(), "coordinator-wrong-key", "{error}");
}

#[tokio::test]
async fn a_version_mismatch_says_which_side_to_upgrade() {
    let range = |min, max| VersionRange { min, max };
    for (ours, theirs, upgrade) in
        [(range(1, 1), range(2, 3), Upgrade::Node), (range(4, 5), range(2, 3), Upgrade::Coordinator)]
    {
        let (address, server) = one_connection(move |tcp| async move {
            let secret = Secret32::new(COORDINATOR);
            accept(upgraded(tcp).await, &secret, Purpose::Control, theirs, control::LIMITS).await.map(|_| ())
        })
        .await;
        let node = Node::new();
        let target = node.target(format!("http://{address}"), COORDINATOR);
        let error = within(establish(&target, Purpose::Control, ours, control::LIMITS)).await.err().unwrap();
        assert!(matches!(error, ConnectError::Version { upgrade: u, .. } if u == upgrade), "{error:?}");
        assert!(matches!(within(server).await.unwrap(), Err(AcceptError::Version { .. })));
    }
}

#[tokio::test]
async fn things_that_are_no_coordinator_are_named_as_such() {
    let answers: [&[u8]; 4] = [
        b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.9\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi",
        b"\x15\x03\x03\x00\x02\x02\x46",
    ];
    for answer in answers {
        let (address, _server) = one_connection(move |mut tcp| async move {
            let mut request = [0; 2048];
            let _ = tcp.read(&mut request).await;
            tcp.write_all(answer).await.unwrap();
        })
        .await;
        let error = within(Node::new().control(address)).await.unwrap_err();
        assert_eq!(error.code(), "not-a-coordinator", "{error} for {}", String::from_utf8_lossy(answer));
    }
    let (address, _server) = one_connection(|mut tcp| async move {
        let mut request = [0; 2048];
        let _ = tcp.read(&mut request).await;
        tcp.write_all(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n").await.unwrap();
    })
    .await;
    let error = within(Node::new().control(address)).await.unwrap_err();
    assert_eq!(error.code(), "coordinator-unavailable", "{error}");
}

#[tokio::test]
async fn tls_towards_a_plain_port_says_so() {
    let (address, _server) = one_connection(|mut tcp| async move {
        let mut hello = [0; 2048];
        let _ = tcp.read(&mut hello).await;
        tcp.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await.unwrap();
    })
    .await;
    let node = Node::new();
    let error = within(connect_control(&node.target(format!("https://{address}"), COORDINATOR))).await.unwrap_err();
    assert_eq!(error.code(), "coordinator-tls", "{error}");
}

#[tokio::test]
async fn nobody_there_and_no_such_name_and_no_answer_differ() {
    let node = Node::new();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let closed = listener.local_addr().unwrap();
    drop(listener);
    let error = within(node.control(closed)).await.unwrap_err();
    assert_eq!(error.code(), "coordinator-unreachable", "{error}");

    let url = format!("http://{}.invalid", "a".repeat(64));
    let error = within(connect_control(&node.target(url, COORDINATOR))).await.unwrap_err();
    assert_eq!(error.code(), "coordinator-dns", "{error}");

    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let target = Target { timeout: Duration::from_millis(300), ..node.target(url, COORDINATOR) };
    let error = within(connect_control(&target)).await.unwrap_err();
    assert_eq!(error.code(), "coordinator-timeout", "{error}");
}

#[tokio::test]
async fn a_recorded_handshake_is_not_believed() {
    let (address, server) = one_connection(serve_control).await;
    let url = format!("ws://{address}/v1/control");
    let (mut ws, _) = tokio_tungstenite::client_async(url, TcpStream::connect(address).await.unwrap()).await.unwrap();
    // What a recorder has: a good first message. What it has not: the session keys for the confirmation.
    let offer = noise::Offer { versions: Purpose::Control.versions(), program: "0.1.0".into() };
    let key = public_key(&Secret32::new(COORDINATOR));
    let (_, first) = noise::Initiator::start(&Secret32::new(NODE), &key, Purpose::Control, &offer).unwrap();
    ws.send(Message::Binary(first.into())).await.unwrap();
    ws.send(Message::Binary(vec![0; 17].into())).await.unwrap();
    assert_eq!(within(server).await.unwrap().err(), Some(AcceptError::Malformed));
}

#[tokio::test]
async fn garbage_after_the_handshake_ends_the_link() {
    let garbage = [
        Message::Binary(vec![0; 40].into()),
        Message::Binary(vec![].into()),
        Message::Binary(vec![0; noise::MAX_NOISE + 1].into()),
        Message::Text("hello".into()),
    ];
    for message in garbage {
        let shown = format!("{message:.40?}");
        let (address, server) = one_connection(serve_control).await;
        let node = Node::new();
        let target = node.target(format!("http://{address}"), COORDINATOR);
        let (ws, _ciphers, _info) =
            within(establish(&target, Purpose::Control, Purpose::Control.versions(), control::LIMITS)).await.unwrap();
        let connect::Ws::Plain(mut ws) = ws else { panic!("the URL is http") };
        ws.send(message).await.unwrap();
        let (_tx, mut rx) = within(server).await.unwrap().unwrap().1.split();
        let end = within(rx.recv::<Note>()).await;
        assert!(matches!(end, Err(LinkError::Protocol(_))), "{end:?} for {shown}");
    }
}
