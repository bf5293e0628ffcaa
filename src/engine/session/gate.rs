//! What handshakes must pass before anything expensive happens: the keyed hash (mac1) that only who knows our public
//! key can make, and above a rate the cookie (mac2) that only who owns its source address can make. WireGuard paper,
//! section 5.3.
//!
//! boringtun's rate limiter counts until somebody resets it, so the gate does, each second. And `Tunn::decapsulate`
//! checks and counts again, which is why each [`super::tunnel::Tunnel`] brings a limiter without a limit.

use std::fmt;
use std::net::IpAddr;
use std::time::Duration;

use boringtun::noise::handshake::parse_handshake_anon;
use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::noise::{Packet, Tunn, TunnResult};
use x25519_dalek::{PublicKey, StaticSecret};

use super::sync_clock;
use crate::time::Now;
use crate::trust::keys::Secret32;
use crate::wire::keys::WgKey;
use crate::wire::wireguard::COOKIE_LEN;

/// Handshake messages a second that pass without a cookie, from all addresses together.
pub const LIMIT: u64 = 100;
/// How often the count starts again.
const PERIOD: Duration = Duration::from_secs(1);

/// What to do with a handshake message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Process it.
    Pass,
    /// Too many: send the first `len` bytes of the buffer (a cookie reply) back where it came from, and drop it.
    Cookie(usize),
    /// Drop it: it was not made for our key.
    Drop,
}

/// The gate in front of a node's handshakes.
pub struct Gate {
    limiter: RateLimiter,
    last_reset: Now,
}

impl Gate {
    /// The gate of the node with this public key.
    #[must_use]
    pub fn new(my_public: &WgKey) -> Self {
        Self { limiter: RateLimiter::new(&PublicKey::from(my_public.0), LIMIT), last_reset: Now::ZERO }
    }

    /// Judges a handshake initiation or response that came from `from`, and counts it once. For messages through a
    /// relay pass a fixed pseudo address of the sender: without one boringtun could not answer with a cookie.
    /// `cookie_out` must have room for 64 bytes. Other messages than handshakes pass uncounted.
    pub fn check(&mut self, from: IpAddr, datagram: &[u8], cookie_out: &mut [u8], now: Now) -> Verdict {
        sync_clock(now);
        if now.since(self.last_reset) >= PERIOD {
            self.limiter.reset_count();
            self.last_reset = now;
        }
        if cookie_out.len() < COOKIE_LEN {
            return Verdict::Drop;
        }
        match self.limiter.verify_packet(Some(from), datagram, cookie_out) {
            Ok(_) => Verdict::Pass,
            Err(TunnResult::WriteToNetwork(cookie)) => Verdict::Cookie(cookie.len()),
            Err(
                TunnResult::Done
                | TunnResult::Err(_)
                | TunnResult::WriteToTunnelV4(..)
                | TunnResult::WriteToTunnelV6(..),
            ) => Verdict::Drop,
        }
    }
}

impl fmt::Debug for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gate").field("last_reset", &self.last_reset).finish_non_exhaustive()
    }
}

/// Who claims to have sent a handshake initiation. Costs one X25519, so pass the gate first. The key is not proven
/// until the tunnel accepts the message. None if the message was not made for our key.
#[must_use]
pub fn peer_of_init(my_secret: &Secret32, my_public: &WgKey, datagram: &[u8]) -> Option<WgKey> {
    let Ok(Packet::HandshakeInit(init)) = Tunn::parse_incoming_packet(datagram) else { return None };
    let secret = StaticSecret::from(*my_secret.expose());
    parse_handshake_anon(&secret, &PublicKey::from(my_public.0), &init).ok().map(|half| WgKey(half.peer_static_public))
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;
    use crate::engine::session::tunnel::Tunnel;

    const FROM: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));

    fn public(secret: &Secret32) -> WgKey {
        WgKey(PublicKey::from(&StaticSecret::from(*secret.expose())).to_bytes())
    }

    fn init_to(peer: &WgKey) -> Vec<u8> {
        let mut out = [0; 200];
        let mut tunnel = Tunnel::new(&Secret32::new([1; 32]), peer, 1);
        let len = tunnel.initiate(&mut out, false, Now::from_millis(1)).unwrap();
        out[..len].to_vec()
    }

    #[test]
    fn only_messages_made_for_our_key_pass_and_tell_their_sender() {
        let (me, other) = (Secret32::new([2; 32]), Secret32::new([3; 32]));
        let mut gate = Gate::new(&public(&me));
        let mut cookie = [0; 64];
        let mut check = |bytes: &[u8]| gate.check(FROM, bytes, &mut cookie, Now::from_millis(5));
        let init = init_to(&public(&me));
        assert_eq!(check(&init), Verdict::Pass);
        assert_eq!(check(&init_to(&public(&other))), Verdict::Drop);
        assert_eq!(check(&init[..100]), Verdict::Drop);
        assert_eq!(check(&[]), Verdict::Drop);
        for at in 0..132 {
            let mut flipped = init.clone();
            flipped[at] ^= 1;
            assert_eq!(check(&flipped), Verdict::Drop, "byte {at}");
        }
        assert_eq!(peer_of_init(&me, &public(&me), &init), Some(public(&Secret32::new([1; 32]))));
        assert_eq!(peer_of_init(&other, &public(&other), &init), None);
        assert_eq!(peer_of_init(&me, &public(&me), &init[..147]), None);
    }

    #[test]
    fn a_flood_is_answered_with_cookies_and_junk_is_not_counted() {
        let me = Secret32::new([2; 32]);
        let mut gate = Gate::new(&public(&me));
        let mut cookie = [0; 64];
        let now = Now::from_millis(5);
        for _ in 0..LIMIT * 10 {
            assert_eq!(gate.check(FROM, &init_to_other(), &mut cookie, now), Verdict::Drop);
        }
        let init = init_to(&public(&me));
        let passed = (0..LIMIT * 2).filter(|_| gate.check(FROM, &init, &mut cookie, now) == Verdict::Pass).count();
        assert_eq!(u64::try_from(passed), Ok(LIMIT));
        assert_eq!(gate.check(FROM, &init, &mut cookie, now), Verdict::Cookie(64));
        assert_eq!(crate::wire::classify::classify(&cookie), crate::wire::classify::Kind::CookieReply);
        assert_eq!(gate.check(FROM, &init, &mut [0; 63], now), Verdict::Drop, "no room for the cookie");
    }

    fn init_to_other() -> Vec<u8> {
        let mut bytes = vec![0; 148];
        bytes[0] = 1;
        bytes
    }
}
