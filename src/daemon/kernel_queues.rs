//! What the kernel dropped in the queues between it and this node: it counts by itself, and is asked when somebody wants to
//! know.

use std::sync::Arc;

use crate::engine::drops::{Drop, Drops};
use crate::os::netlink::Netlink;
use crate::os::udp::UdpSockets;

/// The queues of one node.
#[derive(Debug)]
pub(super) struct KernelQueues {
    /// The interface's number.
    pub(super) interface: u32,
    pub(super) sockets: Arc<UdpSockets>,
}

impl KernelQueues {
    /// Notes what was dropped so far.
    pub(super) async fn note(&self, drops: &Drops) {
        drops.set(Drop::UdpQueueFull, self.sockets.overflowed());
        // A connection of its own: the others may be in the middle of a list.
        let Ok(netlink) = Netlink::connect() else { return };
        // An interface that is gone: what is noted stays.
        if let Ok(Some(dropped)) = netlink.dropped(self.interface).await {
            drops.set(Drop::TunQueueFull, dropped);
        }
    }
}
