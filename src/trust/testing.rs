//! A network made in memory, for the tests of this crate.

use ed25519_dalek::SigningKey;
use rand::SeedableRng;
use rand::rngs::StdRng;

use crate::time::UnixSeconds;
use crate::trust::founding::{Terms, found, invite_record, member_record, network_id};
use crate::trust::keys::{NodeKeys, Secret32};
use crate::trust::ledger::{Judge, Ledger};
use crate::trust::record::{SignedRecord, member_ipv6};
use crate::wire::keys::NetworkId;

/// When everything in it was made.
pub(crate) const NOW: UnixSeconds = 1_800_000_000;

/// The founder's side of a network.
pub(crate) struct Founder {
    pub(crate) rng: StdRng,
    pub(crate) keys: NodeKeys,
    pub(crate) root: SigningKey,
    pub(crate) network: NetworkId,
    pub(crate) records: [SignedRecord; 4],
}

impl Founder {
    pub(crate) fn new(seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let keys = NodeKeys::generate(&mut rng);
        let root = Secret32::random(&mut rng).signing_key();
        let (ipv4, ipv6) = ("100.71.0.0/24".parse().unwrap(), "fd00:1:2::/48".parse().unwrap());
        let records = found(&keys, &root, "home", "laptop", ipv4, ipv6, NOW, &mut rng);
        Self { rng, keys, network: network_id(&root), root, records }
    }

    pub(crate) fn ledger(&self) -> Ledger {
        let mut ledger = Ledger::new(self.network);
        ledger.admit_all(&self.records, Judge::Reader).unwrap();
        ledger
    }

    /// The founding node's identity key.
    pub(crate) fn admin(&self) -> SigningKey {
        self.keys.identity.signing_key()
    }

    pub(crate) fn invite(&mut self, terms: Terms) -> (Secret32, SignedRecord) {
        let admin = self.admin();
        invite_record(&admin, self.network, terms, NOW, &mut self.rng)
    }

    pub(crate) fn node(&mut self) -> NodeKeys {
        NodeKeys::generate(&mut self.rng)
    }

    /// The Member record of a node with the last part of its address.
    pub(crate) fn member(&self, keys: &NodeKeys, invite: &Secret32, name: &str, host: u8) -> SignedRecord {
        let ipv6 = member_ipv6("fd00:1:2::/48".parse().unwrap(), &keys.identity_key());
        member_record(keys, invite, self.network, name, [100, 71, 0, host].into(), ipv6, NOW)
    }
}

/// Terms of an ordinary invite.
pub(crate) fn open_terms(uses: u32) -> Terms {
    Terms { uses, expires: NOW + 86_400, ..Terms::default() }
}
