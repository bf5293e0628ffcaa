//! A peer's WireGuard session.

pub mod gate;
pub mod table;
pub mod tunnel;
