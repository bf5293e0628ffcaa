//! Packets that are longer than their path takes: cut where that is invisible, fragmented where it is allowed, and else
//! answered with the error that makes their sender send shorter ones. Nothing is lost in silence.

use std::time::Duration;

use crate::engine::path::mtu::BASE;
use crate::time::Now;
use crate::wire::fragment::{self, Fragments};
use crate::wire::ip;
use crate::wire::offload::{self, Cut};

/// Errors told at once, and how often another one: what Linux allows (`icmp_msgs_burst`, `icmp_msgs_per_sec`) is more, but
/// these only go to our own kernel and whom it forwards for.
const BURST: u32 = 32;
const EVERY: Duration = Duration::from_millis(5);

/// What becomes of a packet.
#[derive(Debug)]
pub(crate) enum Fitted<'a> {
    /// It goes in these pieces.
    Pieces(Pieces<'a>),
    /// It goes whole, by the relay, which takes more than the direct path.
    Whole,
    /// It does not go. Its sender gets this packet, unless it may not or was told enough.
    Refused(Option<Vec<u8>>),
}

/// The pieces of a packet. Not an iterator: a piece is gone when the next is asked for.
#[derive(Debug)]
pub(crate) enum Pieces<'a> {
    Segments(Cut<'a>),
    Fragments(Fragments<'a>, &'a mut Vec<u8>),
}

impl Pieces<'_> {
    pub(crate) fn next(&mut self) -> Option<&[u8]> {
        match self {
            Self::Segments(cut) => cut.next(),
            Self::Fragments(fragments, piece) => fragments.next_into(piece).then_some(piece.as_slice()),
        }
    }
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Fit {
    /// A copy that is cut, or the fragment that is sent now.
    scratch: Vec<u8>,
    tokens: u32,
    refilled: Now,
}

impl Default for Fit {
    fn default() -> Self {
        Self { scratch: Vec::new(), tokens: BURST, refilled: Now::ZERO }
    }
}

impl Fit {
    /// Makes a complete packet fit a path that takes `limit` bytes.
    pub(crate) fn fit<'a>(&'a mut self, packet: &'a [u8], limit: u16, now: Now) -> Fitted<'a> {
        let longest = usize::from(limit);
        self.scratch.clear();
        self.scratch.extend_from_slice(packet);
        // A sender of TCP would do the same if it knew: no error to it, which its kernel would remember for ten minutes.
        if let Some(offload) = offload::tcp_as_superpacket(&mut self.scratch) {
            return match offload::cut(&offload, &mut self.scratch, longest) {
                Ok(cut) => Fitted::Pieces(Pieces::Segments(cut)),
                Err(_) => Fitted::Refused(None),
            };
        }
        // Fragments stay together on the direct path, also the last one, which the relay would take.
        if let Some(fragments) = fragment::fragments(packet, longest) {
            return Fitted::Pieces(Pieces::Fragments(fragments, &mut self.scratch));
        }
        if packet.len() <= usize::from(BASE) {
            return Fitted::Whole;
        }
        let told = self.may_tell(now).then(|| ip::packet_too_big(packet, limit.max(BASE))).flatten();
        Fitted::Refused(told)
    }

    fn may_tell(&mut self, now: Now) -> bool {
        let earned = now.since(self.refilled).as_micros() / EVERY.as_micros();
        if earned > 0 {
            self.tokens = self.tokens.saturating_add(u32::try_from(earned).unwrap_or(BURST)).min(BURST);
            self.refilled = now;
        }
        let may = self.tokens > 0;
        self.tokens = self.tokens.saturating_sub(1);
        may
    }
}

#[cfg(test)]
mod tests {
    use etherparse::PacketBuilder;

    use super::*;

    fn udp(v6: bool, len: usize, may_fragment: bool) -> Vec<u8> {
        let ip = if v6 { PacketBuilder::ipv6([1; 16], [2; 16], 9) } else { PacketBuilder::ipv4([1; 4], [3; 4], 9) };
        let mut out = Vec::new();
        ip.udp(1, 2).write(&mut out, &vec![7; len]).unwrap();
        if !v6 && may_fragment {
            out[6] &= !0x40;
        }
        out
    }

    fn tcp(v6: bool, len: usize, syn: bool) -> Vec<u8> {
        let ip = if v6 { PacketBuilder::ipv6([1; 16], [2; 16], 9) } else { PacketBuilder::ipv4([1; 4], [3; 4], 9) };
        let mut tcp = ip.tcp(1, 2, 3, 4);
        if syn {
            tcp = tcp.syn();
        }
        let mut out = Vec::new();
        tcp.write(&mut out, &vec![7; len]).unwrap();
        out
    }

    fn pieces(fitted: Fitted<'_>) -> Vec<usize> {
        let Fitted::Pieces(mut pieces) = fitted else { panic!("{fitted:?}") };
        std::iter::from_fn(|| pieces.next().map(<[u8]>::len)).collect()
    }

    #[test]
    fn tcp_is_cut_on_every_path() {
        let mut fit = Fit::default();
        for (v6, headers) in [(false, 40), (true, 60)] {
            let packet = tcp(v6, 1400, false);
            assert_eq!(pieces(fit.fit(&packet, 1280, Now(1))), [1280, packet.len() - 1280 + headers]);
            assert_eq!(pieces(fit.fit(&packet, 576, Now(1)))[..2], [576, 576]);
            // Data that comes with the first packet must come with it.
            assert!(matches!(fit.fit(&tcp(v6, 1400, true), 1280, Now(1)), Fitted::Refused(Some(_))));
        }
    }

    #[test]
    fn the_rest_is_fragmented_relayed_or_refused() {
        let mut fit = Fit::default();
        assert_eq!(pieces(fit.fit(&udp(false, 1400, true), 1280, Now(1))), [1276, 172]);
        for (v6, may) in [(false, false), (true, false)] {
            let packet = udp(v6, 1400, may);
            for limit in [1280, 1120] {
                let Fitted::Refused(Some(error)) = fit.fit(&packet, limit, Now(1)) else { panic!() };
                assert_eq!(Some(error), ip::packet_too_big(&packet, 1280));
            }
            assert!(matches!(fit.fit(&udp(v6, 1200, may), 1120, Now(1)), Fitted::Whole));
        }
    }

    #[test]
    fn errors_are_told_sparingly() {
        let mut fit = Fit::default();
        let packet = udp(true, 1400, false);
        let mut told = |now| matches!(fit.fit(&packet, 1280, now), Fitted::Refused(Some(_)));
        let at = Now::from_millis(10_000);
        assert_eq!((0..100).filter(|_| told(at)).count(), 32);
        assert!(!told(at + Duration::from_millis(4)));
        assert_eq!((0..100).filter(|_| told(at + Duration::from_millis(50))).count(), 10);
    }
}
