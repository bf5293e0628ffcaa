//! (being built)

/// The coordinator.
#[derive(Debug)]
pub struct Coordinator;
