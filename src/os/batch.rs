//! A fixed block of memory for the packets of one system call or one turn.

/// Bytes kept for one packet. Larger than any packet of a mesh with an MTU of up to 1500; a longer one arrives truncated
/// and is refused by whoever parses it.
pub const SLOT: usize = 2048;

/// Packets of one receive, each in its own slot. Allocated once.
#[derive(Debug)]
pub struct Batch<M> {
    bytes: Box<[u8]>,
    filled: Vec<(usize, M)>,
    capacity: usize,
}

impl<M> Batch<M> {
    /// Room for `capacity` packets.
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        Self { bytes: vec![0; capacity * SLOT].into_boxed_slice(), filled: Vec::with_capacity(capacity), capacity }
    }

    /// Forgets the packets.
    pub fn clear(&mut self) {
        self.filled.clear();
    }

    /// Packets held.
    #[must_use]
    pub fn len(&self) -> usize {
        self.filled.len()
    }

    /// No packet is held.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.filled.is_empty()
    }

    /// No further packet fits.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.filled.len() >= self.capacity
    }

    /// The next free slot, [`SLOT`] bytes; [`Batch::push`] then keeps what was written into it.
    pub fn slot(&mut self) -> Option<&mut [u8]> {
        let start = self.filled.len().checked_mul(SLOT)?;
        self.bytes.get_mut(start..start + SLOT)
    }

    /// Keeps the first `len` bytes of the slot handed out last.
    pub fn push(&mut self, len: usize, meta: M) {
        if !self.is_full() {
            self.filled.push((len.min(SLOT), meta));
        }
    }

    /// The packets in the order they came. They may be changed in place.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (&mut [u8], &M)> {
        self.bytes.chunks_exact_mut(SLOT).zip(&self.filled).map(|(slot, (len, meta))| (&mut slot[..*len], meta))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_come_back_in_order_and_a_full_batch_takes_no_more() {
        let mut batch = Batch::new(2);
        for byte in 1..=3u8 {
            if let Some(slot) = batch.slot() {
                slot[..3].fill(byte);
                batch.push(usize::from(byte), byte);
            }
        }
        assert!(batch.is_full());
        let got: Vec<_> = batch.iter_mut().map(|(bytes, meta)| (bytes.to_vec(), *meta)).collect();
        assert_eq!(got, [(vec![1], 1), (vec![2, 2], 2)]);
        batch.clear();
        assert!(batch.is_empty() && batch.slot().is_some());
    }
}
