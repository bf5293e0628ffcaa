//! The mark on what meshd itself sends, by which the kernel's routing keeps it out of meshd's own tunnel.

use std::os::fd::AsFd;

use socket2::SockRef;

/// "mesh". Rules match it whole, so it shares no bit with the marks of others.
pub const MARK: u32 = 0x6d65_7368;

/// Marks what a socket sends. Needs `CAP_NET_ADMIN`, which a node has; a program without it has no tunnel to keep out of.
pub fn mark(socket: &impl AsFd) {
    if let Err(error) = SockRef::from(socket).set_mark(MARK) {
        tracing::debug!(%error, "a socket could not be marked");
    }
}
