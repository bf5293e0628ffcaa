//! A whole run as one line of text, and back; also from raw bytes, so that a fuzzer can steer it.
//!
//! ```text
//! a=eim+apdf b=apdm+adf shape=apart loss=20 seed=7
//! ```
//!
//! Fields with their default value are left out when a scenario is written. A chain of NATs is written from the host
//! outwards: `a=linux/eim+eif`.

use std::fmt;
use std::str::FromStr;

use crate::dice::Dice;
use crate::link::Link;
use crate::nat::{Filtering, Kind, Mapping, NAMES, Rfc4787};
use crate::town::{Families, Site, Town};
use crate::world::{HostId, World};

/// How the two hosts lie to each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Shape {
    /// Each behind its own NATs on the internet.
    Apart,
    /// In one network behind the first host's NATs.
    Lan,
    /// Each behind its own NATs, both behind the same carrier's NAT.
    Carrier,
}

/// Everything that decides a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Scenario {
    /// The NATs of the first host, the nearest first.
    pub(crate) a: Vec<Kind>,
    /// The NATs of the second host.
    pub(crate) b: Vec<Kind>,
    pub(crate) shape: Shape,
    /// The carrier's NAT.
    pub(crate) carrier: Kind,
    /// Percent of datagrams lost on the internet, each way.
    pub(crate) loss: u8,
    /// One-way milliseconds between two sites.
    pub(crate) direct_ms: u64,
    /// One-way milliseconds from node to node through the relay.
    pub(crate) relay_ms: u64,
    /// Milliseconds of jitter on the internet.
    pub(crate) jitter_ms: u64,
    /// Percent duplicated on the internet.
    pub(crate) duplicate: u8,
    /// Percent held back on the internet.
    pub(crate) reorder: u8,
    /// 4, 6 or 46.
    pub(crate) ip: u8,
    /// Milliseconds by which the second host starts later.
    pub(crate) skew_ms: u64,
    pub(crate) seed: u64,
}

impl Default for Scenario {
    fn default() -> Self {
        Self {
            a: vec![Kind::Public],
            b: vec![Kind::Public],
            shape: Shape::Apart,
            carrier: default_carrier(),
            loss: 0,
            direct_ms: 20,
            relay_ms: 30,
            jitter_ms: 0,
            duplicate: 0,
            reorder: 0,
            ip: 4,
            skew_ms: 0,
            seed: 0,
        }
    }
}

/// RFC 6888: a carrier's NAT is endpoint-independent and hairpins.
const fn default_carrier() -> Kind {
    Kind::Rfc4787(Rfc4787 { hairpin: true, ..Rfc4787::new(Mapping::Eim, Filtering::Eif) })
}

/// Where a scenario put its hosts.
#[derive(Debug)]
pub(crate) struct Places {
    pub(crate) town: Town,
    pub(crate) a: HostId,
    pub(crate) b: HostId,
    pub(crate) server: HostId,
    pub(crate) site_a: Site,
    pub(crate) site_b: Site,
}

impl Scenario {
    /// Two NATs, apart, nothing lost.
    pub(crate) fn pair(a: Kind, b: Kind) -> Self {
        Self { a: vec![a], b: vec![b], ..Self::default() }
    }

    /// A scenario for any bytes; missing bytes count as zero.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Self {
        let mut rest = bytes.iter().copied();
        let mut draw = |n: u8| rest.next().unwrap_or(0) % n;
        let count = u8::try_from(NAMES.len()).unwrap_or(u8::MAX);
        let mut kind = || NAMES[usize::from(draw(count))].parse().unwrap_or(Kind::Public);
        let (a, b) = (kind(), kind());
        let shape = [Shape::Apart, Shape::Lan, Shape::Carrier][usize::from(draw(3))];
        Self {
            a: vec![a],
            b: vec![b],
            shape,
            loss: draw(21),
            direct_ms: 1 + u64::from(draw(120)),
            relay_ms: 2 + u64::from(draw(200)),
            jitter_ms: u64::from(draw(10)),
            duplicate: draw(6),
            reorder: draw(6),
            ip: [4, 4, 4, 46, 6][usize::from(draw(5))],
            seed: u64::from_le_bytes(std::array::from_fn(|_| draw(255))),
            ..Self::default()
        }
    }

    /// How the internet treats datagrams.
    pub(crate) fn weather(&self) -> Link {
        Link {
            jitter_us: self.jitter_ms * 1_000,
            loss: self.loss,
            duplicate: self.duplicate,
            reorder: self.reorder,
            ..Link::default()
        }
    }

    /// Datagrams come late, twice or out of order.
    pub(crate) const fn is_rough(&self) -> bool {
        self.jitter_ms > 0 || self.duplicate > 0 || self.reorder > 0
    }

    pub(crate) const fn families(&self) -> Families {
        match self.ip {
            6 => Families::V6,
            46 => Families::Both,
            _ => Families::V4,
        }
    }

    /// Puts the networks, both hosts and the coordinator's host into a world.
    pub(crate) fn build<E>(&self, world: &mut World<E>) -> Places {
        let dice = Dice::new(self.seed).fork("town");
        let mut town = Town::new(world, self.weather(), self.direct_ms * 1_000, self.families(), dice);
        let server = town.server(world, self.relay_ms * 1_000);
        let carrier = (self.shape == Shape::Carrier).then(|| town.carrier(world, self.carrier));
        let site_a = town.site(world, "a", &self.a, carrier.as_ref());
        let site_b = match self.shape {
            Shape::Lan => site_a.clone(),
            Shape::Apart | Shape::Carrier => town.site(world, "b", &self.b, carrier.as_ref()),
        };
        let a = site_a.host(world, "a", 1);
        let b = site_b.host(world, "b", 2);
        Places { town, a, b, server, site_a, site_b }
    }
}

impl fmt::Display for Scenario {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let chain = |kinds: &[Kind]| kinds.iter().map(Kind::to_string).collect::<Vec<_>>().join("/");
        write!(f, "a={} b={} shape=", chain(&self.a), chain(&self.b))?;
        f.write_str(match self.shape {
            Shape::Apart => "apart",
            Shape::Lan => "lan",
            Shape::Carrier => "carrier",
        })?;
        if self.carrier != default_carrier() {
            write!(f, " c={}", self.carrier)?;
        }
        write!(f, " loss={}", self.loss)?;
        let plain = Self::default();
        for (name, value, default) in [
            ("direct", self.direct_ms, plain.direct_ms),
            ("relay", self.relay_ms, plain.relay_ms),
            ("jitter", self.jitter_ms, plain.jitter_ms),
            ("dup", u64::from(self.duplicate), 0),
            ("reorder", u64::from(self.reorder), 0),
            ("ip", u64::from(self.ip), 4),
            ("skew", self.skew_ms, 0),
        ] {
            if value != default {
                write!(f, " {name}={value}")?;
            }
        }
        write!(f, " seed={}", self.seed)
    }
}

impl FromStr for Scenario {
    type Err = String;

    fn from_str(line: &str) -> Result<Self, String> {
        let mut scenario = Self::default();
        for word in line.split_whitespace() {
            let (name, value) = word.split_once('=').ok_or_else(|| format!("{word:?} is not name=value"))?;
            let number = || value.parse::<u64>().map_err(|e| format!("{word:?}: {e}"));
            let percent =
                || value.parse::<u8>().ok().filter(|p| *p <= 100).ok_or(format!("{word:?}: not a percentage"));
            let chain = || value.split('/').map(str::parse).collect::<Result<Vec<Kind>, _>>();
            match name {
                "a" => scenario.a = chain()?,
                "b" => scenario.b = chain()?,
                "c" => scenario.carrier = value.parse()?,
                "shape" => {
                    scenario.shape = match value {
                        "apart" => Shape::Apart,
                        "lan" => Shape::Lan,
                        "carrier" => Shape::Carrier,
                        _ => return Err(format!("no shape {value:?}: apart, lan or carrier")),
                    }
                }
                "loss" => scenario.loss = percent()?,
                "dup" => scenario.duplicate = percent()?,
                "reorder" => scenario.reorder = percent()?,
                "direct" => scenario.direct_ms = number()?,
                "relay" => scenario.relay_ms = number()?,
                "jitter" => scenario.jitter_ms = number()?,
                "skew" => scenario.skew_ms = number()?,
                "seed" => scenario.seed = number()?,
                "ip" => {
                    scenario.ip = match value {
                        "4" => 4,
                        "6" => 6,
                        "46" => 46,
                        _ => return Err(format!("ip is 4, 6 or 46, not {value:?}")),
                    }
                }
                _ => return Err(format!("no field {name:?}")),
            }
        }
        Ok(scenario)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_of_the_manual_reads_back_as_itself() {
        let line = "a=eim+apdf b=apdm+adf shape=apart loss=20 seed=7";
        let scenario: Scenario = line.parse().unwrap();
        assert_eq!(scenario.to_string(), line);
        assert_eq!((scenario.loss, scenario.seed, scenario.direct_ms), (20, 7, 20));
    }

    #[test]
    fn every_scenario_made_of_bytes_reads_back() {
        let mut dice = Dice::new(11);
        for _ in 0..2_000 {
            let len = usize::try_from(dice.below(24)).unwrap();
            let scenario = Scenario::from_bytes(&dice.bytes(len));
            assert_eq!(scenario.to_string().parse::<Scenario>().unwrap(), scenario);
        }
    }

    #[test]
    fn mistakes_are_named() {
        for bad in ["a", "a=nat", "loss=101", "shape=ring", "ip=5", "x=1", "seed=-1"] {
            assert!(bad.parse::<Scenario>().is_err(), "{bad}");
        }
    }
}
