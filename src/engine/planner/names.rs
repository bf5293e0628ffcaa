//! The names of the network, for those who answer questions about them.

use ipnet::IpNet;

use crate::engine::names::Zone;
use crate::engine::planner::Planner;

impl Planner {
    /// The zone and its version, if the records have changed since version `known`.
    #[must_use]
    pub fn zone(&self, known: Option<usize>) -> Option<(usize, Zone)> {
        // Records are only ever added.
        let version = self.ledger.log().len();
        let genesis = self.ledger.genesis().filter(|_| known != Some(version))?;
        let ranges = vec![IpNet::V4(genesis.ipv4), IpNet::V6(genesis.ipv6)];
        let members = self.ledger.members().map(|member| (member.name.as_str(), member.ipv4, member.ipv6));
        Some((version, Zone::new(&genesis.name, ranges, members)))
    }
}
