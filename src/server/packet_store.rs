//! Where packets lie between coming and going: receive buffers that are kept while something in them waits.
//!
//! What is sent in the turn it came in is never copied. What has to wait longer keeps its buffer if it fills much of it,
//! and is moved together with other leftovers if not, so that a few small packets do not hold many large buffers. All
//! memory is allocated at the start; a packet for which no room is left is refused.

use std::ops::Range;

use crate::os::train::{BATCH, Buffers, ROOM};

/// A leftover at least this long keeps its buffer; a shorter one is moved.
const WORTH_A_BUFFER: usize = ROOM / 2;

/// Packets, by handle.
#[derive(Debug)]
pub(super) struct PacketStore {
    buffers: Buffers,
    /// Of each buffer: packets in it, and one more while it is being received into or filled.
    holds: Vec<u32>,
    free: Vec<usize>,
    /// The buffer that leftovers are moved to, and how much of it is used.
    filling: Option<(usize, usize)>,
    /// Buffers received into in this turn.
    received: Vec<usize>,
    packets: Vec<Packet>,
    free_packets: Vec<u32>,
    /// Packets that came in this turn, in receive buffers.
    fresh: Vec<u32>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Packet {
    buffer: usize,
    at: usize,
    len: usize,
    segment: usize,
    /// Tells whether a handle in `fresh` still means the packet that came in this turn.
    used: bool,
}

impl PacketStore {
    /// Room for this many buffers and packets.
    pub(super) fn new(buffers: usize, packets: u32) -> Self {
        Self {
            buffers: Buffers::new(buffers),
            holds: vec![0; buffers],
            free: (0..buffers).rev().collect(),
            filling: None,
            received: Vec::with_capacity(buffers),
            packets: vec![Packet::default(); packets as usize],
            free_packets: (0..packets).rev().collect(),
            fresh: Vec::with_capacity(packets as usize),
        }
    }

    /// Up to [`BATCH`] buffers to receive into, and the block they lie in.
    pub(super) fn receivable(&mut self) -> (&mut Buffers, &[usize]) {
        let from = self.free.len().saturating_sub(BATCH);
        (&mut self.buffers, self.free.get(from..).unwrap_or_default())
    }

    /// A buffer of [`Self::receivable`] was received into. It stays taken until [`Self::end_turn`].
    pub(super) fn received(&mut self, buffer: usize) {
        self.free.retain(|free| *free != buffer);
        self.holds[buffer] += 1;
        self.received.push(buffer);
    }

    /// The bytes of a buffer received into in this turn.
    pub(super) fn buffer(&mut self, buffer: usize) -> &mut [u8] {
        self.buffers.get_mut(buffer)
    }

    /// Keeps a run of datagrams of a buffer received into. `None`: too many packets are kept already.
    pub(super) fn keep(&mut self, buffer: usize, range: Range<usize>, segment: usize) -> Option<u32> {
        let handle = self.free_packets.pop()?;
        self.holds[buffer] += 1;
        let packet = Packet { buffer, at: range.start, len: range.len(), segment, used: true };
        self.packets[handle as usize] = packet;
        self.fresh.push(handle);
        Some(handle)
    }

    /// Keeps a copy of `payload` with `head` zeros before it. `None`: there is no room.
    pub(super) fn copy(&mut self, head: usize, payload: &[u8]) -> Option<u32> {
        let len = head + payload.len();
        let handle = self.free_packets.pop()?;
        let Some((buffer, at)) = self.room(len) else {
            self.free_packets.push(handle);
            return None;
        };
        let bytes = &mut self.buffers.get_mut(buffer)[at..at + len];
        bytes[..head].fill(0);
        bytes[head..].copy_from_slice(payload);
        self.packets[handle as usize] = Packet { buffer, at, len, segment: len, used: true };
        Some(handle)
    }

    /// The datagrams of a packet, back to back, and the length of each but the last.
    pub(super) fn get(&self, handle: u32) -> (&[u8], usize) {
        let Packet { buffer, at, len, segment, .. } = self.packets[handle as usize];
        (&self.buffers.get(buffer)[at..at + len], segment)
    }

    /// The datagrams of a packet, to be changed in place.
    pub(super) fn get_mut(&mut self, handle: u32) -> (&mut [u8], usize) {
        let Packet { buffer, at, len, segment, .. } = self.packets[handle as usize];
        (&mut self.buffers.get_mut(buffer)[at..at + len], segment)
    }

    /// Forgets a packet.
    pub(super) fn release(&mut self, handle: u32) {
        let packet = &mut self.packets[handle as usize];
        if std::mem::take(&mut packet.used) {
            let buffer = packet.buffer;
            self.free_packets.push(handle);
            self.let_go(buffer);
        }
    }

    /// The turn is over: leftovers are moved together, and receive buffers in which nothing waits are free again.
    pub(super) fn end_turn(&mut self) {
        let mut fresh = std::mem::take(&mut self.fresh);
        for handle in fresh.drain(..) {
            let Packet { buffer, at, len, used, .. } = self.packets[handle as usize];
            if !used || len >= WORTH_A_BUFFER || !self.received.contains(&buffer) {
                continue;
            }
            // Without room it stays where it is.
            let Some((to, to_at)) = self.room(len) else { continue };
            self.buffers.copy_within(buffer, at, to, to_at, len);
            let packet = &mut self.packets[handle as usize];
            (packet.buffer, packet.at) = (to, to_at);
            self.let_go(buffer);
        }
        self.fresh = fresh;
        while let Some(buffer) = self.received.pop() {
            self.let_go(buffer);
        }
    }

    /// Nothing is kept, and every buffer but the one being filled is free.
    #[cfg(test)]
    pub(super) fn is_clean(&self) -> bool {
        self.free_packets.len() == self.packets.len()
            && self.free.len() + usize::from(self.filling.is_some()) == self.holds.len()
    }

    fn let_go(&mut self, buffer: usize) {
        self.holds[buffer] -= 1;
        if self.holds[buffer] == 0 {
            self.free.push(buffer);
        }
    }

    /// Room for a copy of `len` bytes in the buffer being filled, or in another; held for one packet.
    fn room(&mut self, len: usize) -> Option<(usize, usize)> {
        if len > ROOM {
            return None;
        }
        if let Some((buffer, used)) = self.filling {
            // Only the filling itself holds it: what was in it is gone.
            let used = if self.holds[buffer] == 1 { 0 } else { used };
            if used + len <= ROOM {
                self.filling = Some((buffer, used + len));
                self.holds[buffer] += 1;
                return Some((buffer, used));
            }
        }
        // Some are left for receiving.
        if self.free.len() <= BATCH {
            return None;
        }
        let buffer = self.free.pop()?;
        if let Some((full, _)) = self.filling.replace((buffer, len)) {
            self.let_go(full);
        }
        self.holds[buffer] = 2;
        Some((buffer, 0))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn receive(store: &mut PacketStore, fill: u8) -> usize {
        let buffer = *store.receivable().1.last().unwrap();
        store.received(buffer);
        store.buffer(buffer).fill(fill);
        buffer
    }

    #[test]
    fn what_leaves_in_its_turn_is_not_copied() {
        let mut store = PacketStore::new(12, 16);
        let buffer = receive(&mut store, 7);
        let handle = store.keep(buffer, 100..4_300, 1_400).unwrap();
        let (bytes, segment) = store.get(handle);
        assert_eq!((bytes, segment), (&[7; 4_200][..], 1_400));
        store.release(handle);
        store.end_turn();
        assert!(store.is_clean() && store.filling.is_none());
    }

    #[test]
    fn small_leftovers_share_a_buffer_and_large_ones_keep_theirs() {
        let mut store = PacketStore::new(12, 16);
        let (a, b) = (receive(&mut store, 1), receive(&mut store, 2));
        let small: Vec<u32> = [a, b].iter().map(|buffer| store.keep(*buffer, 10..1_000, 990).unwrap()).collect();
        let large = store.keep(b, 0..WORTH_A_BUFFER, 1_024).unwrap();
        store.end_turn();
        assert_eq!(store.free.len(), 12 - 2, "one holds the large one, one the small ones");
        assert_eq!(store.get(small[0]).0, [1; 990]);
        assert_eq!(store.get(small[1]).0, [2; 990]);
        assert_eq!(store.get(large).0, [2; WORTH_A_BUFFER]);
        small.into_iter().chain([large]).for_each(|handle| store.release(handle));
        assert!(store.is_clean());
    }

    #[test]
    fn without_room_packets_are_refused_and_some_buffers_stay_for_receiving() {
        let mut store = PacketStore::new(BATCH + 2, 1_000);
        let kept: Vec<u32> = std::iter::from_fn(|| store.copy(28, &[5; 40_000])).collect();
        assert_eq!(kept.len(), 2);
        assert_eq!(store.receivable().1.len(), BATCH);
        assert_eq!(&store.get(kept[1]).0[..29], [[0; 28].as_slice(), &[5]].concat());
        kept.into_iter().for_each(|handle| store.release(handle));
        assert!(store.is_clean() && store.copy(0, &[0; ROOM + 1]).is_none() && store.copy(0, &[1; ROOM]).is_some());
        let mut few = PacketStore::new(BATCH + 2, 1);
        assert!(few.copy(0, b"x").is_some() && few.copy(0, b"y").is_none());
    }

    proptest! {
        /// Whatever comes, waits and goes: bytes stay what they were, and in the end nothing is held.
        #[test]
        fn packets_keep_their_bytes(turns in proptest::collection::vec(
            (proptest::collection::vec((1usize..ROOM, any::<bool>()), 0..4), proptest::collection::vec(any::<prop::sample::Index>(), 0..6)), 1..40,
        )) {
            let mut store = PacketStore::new(BATCH + 6, 32);
            let mut kept: Vec<(u32, u8, usize)> = Vec::new();
            let mut fill = 0u8;
            for (packets, releases) in turns {
                for (len, copied) in packets {
                    fill = fill.wrapping_add(1);
                    let handle = if copied {
                        store.copy(0, &vec![fill; len])
                    } else if store.receivable().1.is_empty() {
                        None
                    } else {
                        let buffer = receive(&mut store, fill);
                        store.keep(buffer, 0..len, len)
                    };
                    kept.extend(handle.map(|handle| (handle, fill, len)));
                }
                for release in releases {
                    if !kept.is_empty() {
                        let (handle, ..) = kept.swap_remove(release.index(kept.len()));
                        store.release(handle);
                    }
                }
                store.end_turn();
                for (handle, fill, len) in &kept {
                    prop_assert_eq!(store.get(*handle).0, &vec![*fill; *len][..]);
                }
            }
            kept.into_iter().for_each(|(handle, ..)| store.release(handle));
            prop_assert!(store.is_clean());
        }
    }
}
