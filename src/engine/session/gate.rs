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
