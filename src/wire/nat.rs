//! What nodes tell each other and people of the NAT in front of them: how it chooses external ports, whether it maps one when
//! asked, and what a punch through it showed.

use serde::{Deserialize, Serialize};

/// How a NAT chooses the external port of a new mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "model", rename_all = "kebab-case")]
pub enum PortModel {
    /// The inside port, where it is free.
    Preserving,
    /// One after the other.
    Sequential {
        /// From one mapping to the next; negative if it counts down.
        step: i16,
        /// Mappings that others make in a second.
        per_second: u16,
    },
    /// Any of a block that is much smaller than all ports.
    Block {
        /// The lowest port, as far as samples tell.
        low: u16,
        /// The highest.
        high: u16,
    },
    /// Any port.
    Random,
    /// One that a newer version knows.
    #[serde(other)]
    Unknown,
}

/// How long a NAT keeps a UDP mapping that nobody uses, as far as it was found out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct UdpLifetime {
    /// After so many seconds of silence it was still there.
    pub at_least_s: u16,
    /// After so many it was gone; null: it outlived the test.
    pub less_than_s: Option<u16>,
}

/// Whether the router in front of a node maps a port when it is asked to (PCP, NAT-PMP or UPnP).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mapper {
    /// It has mapped the node's port.
    Found,
    /// It was asked and does not.
    Absent,
    /// Not asked, no answer yet, or something a newer version knows.
    #[default]
    #[serde(other)]
    Unknown,
}

impl Mapper {
    /// Not known, which need not be told.
    #[must_use]
    pub const fn is_unknown(&self) -> bool {
        matches!(self, Self::Unknown)
    }
}

/// What one side saw of a round that found no path.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// Its probes.
    pub sent: u16,
    /// Those of them that were answered.
    pub answered: u16,
    /// The other side's probes that reached it.
    pub heard: u16,
}

impl PortModel {
    /// The word for people and `--json`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Preserving => "preserving",
            Self::Sequential { .. } => "sequential",
            Self::Block { .. } => "block",
            Self::Random => "random",
            Self::Unknown => "unknown",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_model_reads_back_and_a_newer_one_is_unknown() {
        for model in [
            PortModel::Preserving,
            PortModel::Sequential { step: -2, per_second: 200 },
            PortModel::Block { low: 20_000, high: 20_511 },
            PortModel::Random,
        ] {
            let json = serde_json::to_string(&model).unwrap();
            assert!(json.contains(model.name()), "{json}");
            assert_eq!(serde_json::from_str::<PortModel>(&json).unwrap(), model);
        }
        assert_eq!(serde_json::from_str::<Mapper>(r#""absent""#).unwrap(), Mapper::Absent);
        assert_eq!(serde_json::from_str::<Mapper>(r#""by-carrier-pigeon""#).unwrap(), Mapper::Unknown);
        let newer = r#"{"model":"phase-of-the-moon","offset":3}"#;
        assert_eq!(serde_json::from_str::<PortModel>(newer).unwrap(), PortModel::Unknown);
    }
}
