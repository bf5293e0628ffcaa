//! What the packet path did, counted batch by batch: how many packets went through each of its system calls, and how often
//! the kernel's offloads joined them.

use std::sync::atomic::{AtomicU64, Ordering};

named! {
    /// Something the packet path does.
    Counter:
    /// Turns of the packet loop.
    Turns = "turns",
    /// Batches read from the interface.
    TunInBatches = "tun-in-batches",
    /// Packets and superpackets read from the interface.
    TunInPackets = "tun-in-packets",
    /// Superpackets among them, which the kernel left to be cut (TSO, USO).
    TunInSuper = "tun-in-super",
    /// Bytes read from the interface.
    TunInBytes = "tun-in-bytes",
    /// Packets and superpackets written to the interface.
    TunOutWrites = "tun-out-writes",
    /// Packets written to the interface.
    TunOutPackets = "tun-out-packets",
    /// Writes that joined several packets of a flow (GRO).
    TunOutSuper = "tun-out-super",
    /// Bytes written to the interface.
    TunOutBytes = "tun-out-bytes",
    /// Datagrams and trains of datagrams handed to the kernel.
    UdpOutSends = "udp-out-sends",
    /// Datagrams the kernel took.
    UdpOutDatagrams = "udp-out-datagrams",
    /// Trains that went as one (UDP GSO).
    UdpOutTrains = "udp-out-trains",
    /// Trains that went one datagram at a time, because the way takes none or the offload is off.
    UdpOutUncoupled = "udp-out-uncoupled",
    /// Sends that found the kernel's buffer full and waited for room.
    UdpOutWaits = "udp-out-waits",
    /// Bytes of datagrams handed to the kernel.
    UdpOutBytes = "udp-out-bytes",
    /// Datagrams and trains of datagrams taken from the kernel.
    UdpInReceives = "udp-in-receives",
    /// Datagrams taken from the kernel.
    UdpInDatagrams = "udp-in-datagrams",
    /// Trains among them, which the kernel had joined (UDP GRO).
    UdpInTrains = "udp-in-trains",
    /// Bytes of datagrams taken from the kernel.
    UdpInBytes = "udp-in-bytes",
}

/// One counter of each. Written by the data thread alone, so that counting costs no more than a plain addition; read by
/// anybody.
#[derive(Debug)]
pub struct Counters {
    counts: [AtomicU64; Counter::ALL.len()],
}

impl Default for Counters {
    fn default() -> Self {
        Self { counts: std::array::from_fn(|_| AtomicU64::new(0)) }
    }
}

impl Counters {
    /// Adds to a counter. Two threads that do so at once may lose what one of them adds.
    pub fn add(&self, what: Counter, n: usize) {
        let count = &self.counts[what as usize];
        count.store(count.load(Ordering::Relaxed).wrapping_add(n as u64), Ordering::Relaxed);
    }

    /// How often, or how many.
    #[must_use]
    pub fn get(&self, what: Counter) -> u64 {
        self.counts[what as usize].load(Ordering::Relaxed)
    }
}
