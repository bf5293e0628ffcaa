//! (being built)
/// The magic cookie at 4..8 of every STUN message (RFC 8489, section 5).
pub const MAGIC_COOKIE: [u8; 4] = [0x21, 0x12, 0xA4, 0x42];
