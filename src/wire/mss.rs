//! The longest TCP segment that a connection's ends tell each other (RFC 9293 section 3.7.1), lowered to what the path between
//! them takes.

use crate::wire::ip::transport;

const TCP: u8 = 6;
// Offsets in a TCP header, RFC 9293 section 3.1.
const HEADER_LEN: usize = 12;
const FLAGS: usize = 13;
const CHECKSUM: usize = 16;
const OPTIONS: usize = 20;
const SYN: u8 = 0x02;
/// The option that tells it: kind and length.
const MAXIMUM_SEGMENT_SIZE: [u8; 2] = [2, 4];

/// Lowers what a complete packet that opens a TCP connection tells, so that segments make packets of at most `mtu` bytes
/// between hosts that use no IP options. Everything else stays as it is. True: it was changed.
pub fn clamp(packet: &mut [u8], mtu: u16) -> bool {
    let Some((TCP, l4)) = transport(packet) else { return false };
    // Most packets end here.
    if packet.get(l4 + FLAGS).is_none_or(|flags| flags & SYN == 0) {
        return false;
    }
    let ip = if packet[0] >> 4 == 4 { 20 } else { 40 };
    let most = mtu.saturating_sub(ip + 20);
    let end = l4 + usize::from(packet[l4 + HEADER_LEN] >> 4) * 4;
    let mut at = l4 + OPTIONS;
    while let Some(option) = packet.get(at..end).filter(|left| !left.is_empty()) {
        let len = match option {
            [0, ..] => return false,
            [1, ..] => 1,
            [_, len, ..] => usize::from(*len),
            _ => return false,
        };
        if let Some([high, low]) = option.strip_prefix(&MAXIMUM_SEGMENT_SIZE).and_then(|value| value.first_chunk()) {
            let told = u16::from_be_bytes([*high, *low]);
            if told > most {
                set(packet, l4, at + 2, most.to_be_bytes());
            }
            return told > most;
        }
        if len == 0 {
            return false;
        }
        at += len;
    }
    false
}

/// Writes two bytes of the TCP header that begins at `l4`, and the checksum that goes with them: RFC 1624. A byte at an odd
/// place is the low one of its word.
fn set(packet: &mut [u8], l4: usize, at: usize, new: [u8; 2]) {
    let mut sum = u32::from(!u16::from_be_bytes([packet[l4 + CHECKSUM], packet[l4 + CHECKSUM + 1]]));
    for (at, new) in (at..).zip(new) {
        let shift = if (at - l4).is_multiple_of(2) { 8 } else { 0 };
        sum += u32::from(!(u16::from(packet[at]) << shift)) + (u32::from(new) << shift);
        packet[at] = new;
    }
    while sum > 0xFFFF {
        sum = (sum & 0xFFFF) + (sum >> 16);
    }
    let sum = (!u16::try_from(sum).unwrap_or_default()).to_be_bytes();
    packet[l4 + CHECKSUM..l4 + CHECKSUM + 2].copy_from_slice(&sum);
}

#[cfg(test)]
mod tests {
    use etherparse::TcpOptionElement::{
        self, MaximumSegmentSize, Noop, SelectiveAcknowledgementPermitted, WindowScale,
    };
    use etherparse::{PacketBuilder, SlicedPacket, TransportSlice};
    use proptest::prelude::*;

    use super::*;

    fn packet(v6: bool, flags: u8, options: &[TcpOptionElement], payload: &[u8]) -> Vec<u8> {
        let ip = if v6 { PacketBuilder::ipv6([1; 16], [2; 16], 9) } else { PacketBuilder::ipv4([1; 4], [2; 4], 9) };
        let mut tcp = ip.tcp(1, 2, 3, 4).options(options).unwrap();
        if flags & SYN != 0 {
            tcp = tcp.syn();
        }
        if flags & 0x10 != 0 {
            tcp = tcp.ack(9);
        }
        let mut out = Vec::new();
        tcp.write(&mut out, payload).unwrap();
        out
    }

    fn told(packet: &[u8]) -> Option<u16> {
        let sliced = SlicedPacket::from_ip(packet).unwrap();
        let Some(TransportSlice::Tcp(tcp)) = sliced.transport else { panic!("no TCP") };
        let ip = sliced.net.unwrap();
        let sum = match &ip {
            etherparse::NetSlice::Ipv4(ip) => tcp.calc_checksum_ipv4(ip.header().source(), ip.header().destination()),
            etherparse::NetSlice::Ipv6(ip) => tcp.calc_checksum_ipv6(ip.header().source(), ip.header().destination()),
            etherparse::NetSlice::Arp(_) => panic!("no IP"),
        };
        assert_eq!(sum.unwrap(), tcp.checksum(), "the checksum is right");
        let mut options = tcp.options_iterator().flatten();
        options.find_map(|option| if let MaximumSegmentSize(size) = option { Some(size) } else { None })
    }

    #[test]
    fn only_what_opens_a_connection_is_changed_and_only_downwards() {
        for (v6, most) in [(false, 1240), (true, 1220)] {
            for flags in [SYN, SYN | 0x10] {
                let mut long = packet(v6, flags, &[MaximumSegmentSize(1460), WindowScale(7)], &[]);
                assert!(clamp(&mut long, 1280));
                assert_eq!(told(&long), Some(most));
                let mut short = packet(v6, flags, &[MaximumSegmentSize(most)], &[]);
                assert!(!clamp(&mut short, 1280));
                assert_eq!(told(&short), Some(most));
                let mut silent = packet(v6, flags, &[WindowScale(7)], b"data");
                assert!(!clamp(&mut silent, 1280));
            }
            let mut data = packet(v6, 0x10, &[MaximumSegmentSize(1460)], &[]);
            assert!(!clamp(&mut data, 1280));
        }
    }

    #[test]
    fn a_fragment_and_another_protocol_are_left_alone() {
        let whole = packet(false, SYN, &[MaximumSegmentSize(1460)], &[]);
        for (at, value) in [(6, 0x20), (7, 1), (9, 17)] {
            let mut other = whole.clone();
            other[at] = value;
            assert!(!clamp(&mut other, 1280));
        }
        for end in 0..whole.len() {
            clamp(&mut whole.clone()[..end], 1280);
        }
    }

    proptest! {
        #[test]
        fn the_checksum_stays_right_wherever_the_option_is(
            size: u16, mtu in 576u16..9000, before in 0usize..6, after in 0usize..4, v6: bool, payload: Vec<u8>
        ) {
            let mut options = vec![Noop; before];
            options.push(MaximumSegmentSize(size));
            options.extend([SelectiveAcknowledgementPermitted, Noop, Noop].into_iter().take(after));
            let mut packet = packet(v6, SYN, &options, &payload);
            let most = mtu - if v6 { 60 } else { 40 };
            prop_assert_eq!(clamp(&mut packet, mtu), size > most);
            prop_assert_eq!(told(&packet), Some(size.min(most)));
        }

        #[test]
        fn random_options_never_panic(bytes in proptest::collection::vec(any::<u8>(), 40), mtu: u16) {
            let mut packet = packet(false, SYN, &vec![Noop; 40], &[]);
            packet[40..80].copy_from_slice(&bytes);
            clamp(&mut packet, mtu);
        }
    }
}
