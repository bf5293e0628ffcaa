//! (being built: this file is replaced whole by the wire work; keep the names used by src/engine)
#![allow(missing_docs, unused)]
use std::net::SocketAddr;
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct TransactionId(pub [u8; 12]);
#[derive(Default)]
pub struct Change {
    pub ip: bool,
    pub port: bool,
}
pub struct BindingResponse {
    pub txid: TransactionId,
    pub mapped: SocketAddr,
}
pub fn binding_request(t: &TransactionId, c: Change) -> Vec<u8> {
    vec![]
}
pub fn decode_binding_response(b: &[u8]) -> Result<BindingResponse, ()> {
    Err(())
}
pub fn transaction_id(b: &[u8]) -> Option<TransactionId> {
    None
}
pub const MAGIC_COOKIE: [u8; 4] = [0x21, 0x12, 0xa4, 0x42];
