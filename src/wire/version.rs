//! Every protocol number meshd speaks, in one place. `docs/protocol.md` says what each version means.

/// The range of protocol versions one side can speak, carried in the first Noise payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct VersionRange {
    /// The oldest.
    pub min: u16,
    /// The newest.
    pub max: u16,
}

impl VersionRange {
    /// The highest version both ranges hold.
    #[must_use]
    pub fn common(self, other: Self) -> Option<u16> {
        let version = self.max.min(other.max);
        (version >= self.min.max(other.min)).then_some(version)
    }
}

/// Control messages, node ↔ coordinator.
pub const CONTROL: VersionRange = VersionRange { min: 1, max: 1 };
/// Relay frames, node ↔ coordinator.
pub const RELAY: VersionRange = VersionRange { min: 1, max: 1 };
/// Path probes and sealed peer messages, node ↔ node.
pub const PEER: u8 = 1;
/// Messages between the command line and the daemon. Also the `schema` field of every `--json` document.
pub const LOCAL: u16 = 1;
/// The program's version, shown to people.
pub const PROGRAM: &str = env!("CARGO_PKG_VERSION");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_highest_common_version_wins() {
        let range = |min, max| VersionRange { min, max };
        assert_eq!(range(1, 3).common(range(2, 5)), Some(3));
        assert_eq!(range(1, 1).common(range(2, 5)), None);
        assert_eq!(range(4, 5).common(range(1, 3)), None);
    }
}
