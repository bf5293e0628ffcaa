//! (being built: this file is replaced whole by the wire work; keep the names used by src/engine)
#![allow(missing_docs, unused)]
use std::net::IpAddr;
pub struct BadIp;
pub fn destination(p: &[u8]) -> Result<IpAddr, BadIp> {
    Err(BadIp)
}
pub fn source_destination(p: &[u8]) -> Result<(IpAddr, IpAddr), BadIp> {
    Err(BadIp)
}
pub fn unreachable(p: &[u8]) -> Option<Vec<u8>> {
    None
}
