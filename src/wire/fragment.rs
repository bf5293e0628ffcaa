//! IPv4 fragmentation, RFC 791 section 3.2: a packet whose sender allows it is cut so that it fits.

/// Bit of the flags field: must not be fragmented.
const DONT_FRAGMENT: u8 = 0x40;
/// Bit of the flags field: not the last fragment.
const MORE: u8 = 0x20;
/// Bit of an option's type: every fragment has it, not only the first.
const COPIED: u8 = 0x80;
/// The longest IPv4 header.
const LONGEST_HEADER: usize = 60;

/// The fragments of one packet, one after the other.
#[derive(Debug)]
pub struct Fragments<'a> {
    /// What is still to be sent of the payload.
    payload: &'a [u8],
    header: [u8; LONGEST_HEADER],
    header_len: usize,
    /// The header of all but the first.
    later: [u8; LONGEST_HEADER],
    later_len: usize,
    /// In units of eight bytes.
    offset: u16,
    /// The packet itself is a fragment that others follow.
    more: bool,
    longest: usize,
}

/// Cuts a whole IPv4 packet into fragments of at most `longest` bytes. None: it is not IPv4, it must not be fragmented, or
/// `longest` has no room for eight bytes of payload.
#[must_use]
pub fn fragments(packet: &[u8], longest: usize) -> Option<Fragments<'_>> {
    let header_len = usize::from(packet.first()? & 0x0F) * 4;
    if packet[0] >> 4 != 4 || header_len < 20 || packet.len() < header_len || packet[6] & DONT_FRAGMENT != 0 {
        return None;
    }
    if longest < header_len + 8 {
        return None;
    }
    let (bytes, payload) = packet.split_at(header_len);
    let mut header = [0; LONGEST_HEADER];
    header[..header_len].copy_from_slice(bytes);
    let mut later = header;
    let later_len = 20 + copied_options(&bytes[20..], &mut later[20..]);
    #[expect(clippy::cast_possible_truncation, reason = "at most 15")]
    {
        later[0] = 0x40 | (later_len / 4) as u8;
    }
    Some(Fragments {
        payload,
        header,
        header_len,
        later,
        later_len,
        offset: u16::from_be_bytes([bytes[6], bytes[7]]) & 0x1FFF,
        more: bytes[6] & MORE != 0,
        longest,
    })
}

impl Fragments<'_> {
    /// Writes the next fragment in the place of what `into` holds. False: there is none.
    pub fn next_into(&mut self, into: &mut Vec<u8>) -> bool {
        if self.payload.is_empty() {
            return false;
        }
        let header = &self.header[..self.header_len];
        let room = self.longest - header.len();
        let len = if self.payload.len() <= room { self.payload.len() } else { room & !7 };
        let (payload, rest) = self.payload.split_at(len);
        into.clear();
        into.extend_from_slice(header);
        into.extend_from_slice(payload);
        let total = u16::try_from(into.len()).unwrap_or(u16::MAX).to_be_bytes();
        into[2..4].copy_from_slice(&total);
        let more = if rest.is_empty() { self.more } else { true };
        // The bit between DF and the highest one is the only other flag, and must be zero.
        let flags = self.offset | if more { u16::from(MORE) << 8 } else { 0 };
        into[6..8].copy_from_slice(&flags.to_be_bytes());
        into[10..12].fill(0);
        let sum = checksum(&into[..header.len()]);
        into[10..12].copy_from_slice(&sum);
        self.payload = rest;
        self.offset = self.offset.wrapping_add(u16::try_from(len / 8).unwrap_or_default());
        (self.header, self.header_len) = (self.later, self.later_len);
        true
    }
}

/// Those options that every fragment has, filled up to a multiple of four bytes. Returns how many bytes they are.
fn copied_options(options: &[u8], into: &mut [u8]) -> usize {
    into.fill(0);
    let (mut rest, mut used) = (options, 0);
    while let [kind, after @ ..] = rest {
        let len = match kind {
            0 => break,
            1 => {
                rest = after;
                continue;
            }
            _ => after.first().map_or(0, |len| usize::from(*len)),
        };
        let Some(option) = rest.get(..len).filter(|_| len >= 2) else { break };
        if kind & COPIED != 0 {
            into[used..used + len].copy_from_slice(option);
            used += len;
        }
        rest = &rest[len..];
    }
    used.next_multiple_of(4)
}

/// RFC 1071.
fn checksum(header: &[u8]) -> [u8; 2] {
    let pairs = header.chunks_exact(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])));
    let mut sum: u32 = pairs.sum();
    while sum > 0xFFFF {
        sum = (sum & 0xFFFF) + (sum >> 16);
    }
    (!u16::try_from(sum).unwrap_or_default()).to_be_bytes()
}

#[cfg(test)]
mod tests {
    use etherparse::{IpNumber, Ipv4Header, Ipv4HeaderSlice, Ipv4Options};
    use proptest::prelude::*;

    use super::*;

    fn packet(options: &[u8], payload: usize, change: impl FnOnce(&mut Ipv4Header)) -> Vec<u8> {
        let payload: Vec<u8> = (0..payload).map(|n| (n * 7 % 251) as u8).collect();
        let len = u16::try_from(payload.len()).unwrap();
        let mut header = Ipv4Header::new(len, 64, IpNumber::UDP, [10, 0, 0, 1], [10, 0, 0, 2]).unwrap();
        header.identification = 0x1234;
        header.dont_fragment = false;
        header.options = Ipv4Options::try_from(options).unwrap();
        change(&mut header);
        header.header_checksum = header.calc_header_checksum();
        let mut out = Vec::new();
        header.write(&mut out).unwrap();
        out.extend(payload);
        out
    }

    fn all(packet: &[u8], longest: usize) -> Vec<Vec<u8>> {
        let Some(mut fragments) = fragments(packet, longest) else { return Vec::new() };
        let (mut out, mut one) = (Vec::new(), Vec::new());
        while fragments.next_into(&mut one) {
            out.push(one.clone());
        }
        out
    }

    /// What a receiver makes of them, RFC 791 section 3.2.
    fn reassemble(fragments: &[Vec<u8>]) -> Vec<u8> {
        let mut payload = Vec::new();
        for (n, fragment) in fragments.iter().enumerate() {
            let header = Ipv4HeaderSlice::from_slice(fragment).unwrap().to_header();
            assert_eq!(header.header_checksum, header.calc_header_checksum());
            assert_eq!(usize::from(header.total_len), fragment.len());
            assert_eq!(usize::from(header.fragment_offset.value()) * 8, payload.len());
            assert_eq!(header.more_fragments, n + 1 < fragments.len());
            assert_eq!((header.identification, header.dont_fragment), (0x1234, false));
            payload.extend_from_slice(&fragment[header.header_len()..]);
        }
        payload
    }

    #[test]
    fn a_packet_that_may_not_be_cut_is_not() {
        assert!(fragments(&packet(&[], 3000, |h| h.dont_fragment = true), 1280).is_none());
        assert!(fragments(&packet(&[], 3000, |_| {}), 27).is_none());
        assert!(fragments(&[0x60; 60], 1280).is_none());
        assert!(fragments(&[0x45; 19], 1280).is_none());
        assert!(fragments(&[], 1280).is_none());
    }

    #[test]
    fn options_go_where_they_belong() {
        // Record route (only in the first), router alert (in all), end.
        let options = [7, 7, 4, 0, 0, 0, 0, 1, 0x94, 4, 0, 0];
        let cut = all(&packet(&options, 2000, |_| {}), 576);
        assert_eq!(cut[0][20..32], options);
        for later in &cut[1..] {
            assert_eq!((later[0], &later[20..24]), (0x46, &[0x94, 4, 0, 0][..]));
        }
        assert_eq!(reassemble(&cut).len(), 2000);
    }

    #[test]
    fn fragments_of_a_fragment_keep_its_place() {
        let middle = packet(&[], 1480, |h| {
            h.more_fragments = true;
            h.fragment_offset = etherparse::IpFragOffset::try_new(185).unwrap();
        });
        let cut = all(&middle, 700);
        let headers: Vec<_> = cut.iter().map(|f| Ipv4HeaderSlice::from_slice(f).unwrap().to_header()).collect();
        let places: Vec<_> = headers.iter().map(|h| (h.fragment_offset.value(), h.more_fragments)).collect();
        assert_eq!(places, [(185, true), (185 + 85, true), (185 + 170, true)]);
    }

    proptest! {
        #[test]
        fn what_is_cut_can_be_put_together(
            payload in 0usize..60_000,
            longest in 68usize..9000,
            options in prop_oneof![Just(vec![]), Just(vec![0x94, 4, 0, 0]), Just(vec![1, 1, 1, 1, 7, 3, 4, 0])],
        ) {
            let whole = packet(&options, payload, |_| {});
            let cut = all(&whole, longest);
            prop_assert!(cut.iter().all(|f| f.len() <= longest));
            let header = usize::from(whole[0] & 15) * 4;
            prop_assert_eq!(reassemble(&cut), &whole[header..]);
            prop_assert!(cut.len() <= payload.div_ceil((longest - header) & !7).max(1));
        }

        #[test]
        fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), longest in 0usize..120) {
            let mut bytes = bytes;
            if let Some(first) = bytes.first_mut() {
                *first = 0x40 | (*first & 15);
            }
            prop_assert!(all(&bytes, longest).iter().all(|f| f.len() <= longest));
        }
    }
}
