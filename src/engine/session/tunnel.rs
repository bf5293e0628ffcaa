//! (being built)

/// One peer's WireGuard session: boringtun's state machine with the timers it gets wrong.
#[derive(Debug)]
pub struct Tunnel;
