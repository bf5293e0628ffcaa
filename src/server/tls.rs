//! TLS on the coordinator's port. It gets connections through networks; the Noise handshake inside is what protects them,
//! so a certificate that the coordinator made for itself is as good as any (see `link/tls.rs`).

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rcgen::{CertificateParams, DnType, KeyPair};
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use crate::server::state_dir::StateDir;
use crate::wire::local::Problem;

/// Where the certificate comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Tls {
    /// No TLS: a proxy in front does it, or nobody.
    Off,
    /// A self-made certificate, kept in the state directory.
    SelfMade,
    /// PEM files: the chain, and its key.
    Files {
        /// The chain, leaf first.
        cert: PathBuf,
        /// The key.
        key: PathBuf,
    },
}

impl Tls {
    /// The rustls configuration; `None` for [`Tls::Off`]. `host` goes into a certificate made now.
    ///
    /// # Errors
    /// `tls-certificate` or `state-dir`.
    pub fn server_config(&self, dir: &StateDir, host: &str) -> Result<Option<Arc<ServerConfig>>, Problem> {
        let (cert, key, hint) = match self {
            Self::Off => return Ok(None),
            Self::SelfMade => {
                let (cert, key) = dir.tls();
                if !key.exists() {
                    make(dir, host)?;
                }
                (cert, key, "remove both files; new ones are made at the next start")
            }
            Self::Files { cert, key } => {
                (cert.clone(), key.clone(), "give PEM files with --tls-cert and --tls-key, or leave both out")
            }
        };
        load(&cert, &key, hint).map(Some)
    }
}

fn make(dir: &StateDir, host: &str) -> Result<(), Problem> {
    let make = || -> Result<(String, String), rcgen::Error> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(vec![host.to_owned()])?;
        params.distinguished_name.push(DnType::CommonName, "meshd coordinator");
        Ok((params.self_signed(&key)?.pem(), key.serialize_pem()))
    };
    let (cert, key) = make().map_err(|e| Problem {
        code: "tls-certificate".into(),
        text: format!("no certificate could be made for {host:?}: {e}"),
        hint: "check the host in --public-url, or give a certificate with --tls-cert and --tls-key".into(),
    })?;
    dir.keep_certificate(&cert, &key)
}

fn load(cert: &Path, key: &Path, hint: &str) -> Result<Arc<ServerConfig>, Problem> {
    let bad = |path: &Path, why: &dyn std::fmt::Display| Problem {
        code: "tls-certificate".into(),
        text: format!("the TLS certificate cannot be used: {}: {why}", path.display()),
        hint: hint.to_owned(),
    };
    let chain: Vec<CertificateDer<'static>> =
        CertificateDer::pem_file_iter(cert).and_then(Iterator::collect::<Result<_, _>>).map_err(|e| bad(cert, &e))?;
    if chain.is_empty() {
        return Err(bad(cert, &"it holds no certificate"));
    }
    let secret = PrivateKeyDer::from_pem_file(key).map_err(|e| bad(key, &e))?;
    let mut config = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .and_then(|builder| builder.with_no_client_auth().with_single_cert(chain, secret))
        .map_err(|e| bad(key, &e))?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_self_made_certificate_is_made_once() {
        let parent = tempfile::tempdir().unwrap();
        let dir = StateDir::open(parent.path()).unwrap();
        for host in ["203.0.113.5", "mesh.example.org"] {
            assert!(Tls::SelfMade.server_config(&dir, host).unwrap().is_some());
        }
        let (cert, key) = dir.tls();
        let before = std::fs::read(&key).unwrap();
        assert!(Tls::Files { cert: cert.clone(), key: key.clone() }.server_config(&dir, "x").unwrap().is_some());
        assert_eq!(std::fs::read(&key).unwrap(), before);
        assert!(Tls::Off.server_config(&dir, "x").unwrap().is_none());
    }

    #[test]
    fn certificates_that_cannot_be_used_say_why() {
        let parent = tempfile::tempdir().unwrap();
        let dir = StateDir::open(parent.path()).unwrap();
        Tls::SelfMade.server_config(&dir, "a.example").unwrap();
        let (cert, key) = dir.tls();
        let other = tempfile::tempdir().unwrap();
        let other_dir = StateDir::open(other.path()).unwrap();
        Tls::SelfMade.server_config(&other_dir, "b.example").unwrap();
        let empty = parent.path().join("empty.pem");
        std::fs::write(&empty, "").unwrap();
        for (cert, key) in [
            (parent.path().join("none.pem"), key.clone()),
            (cert.clone(), parent.path().join("none.pem")),
            (empty, key),
            (cert.clone(), cert.clone()),
            (cert, other_dir.tls().1),
        ] {
            let tls = Tls::Files { cert, key };
            let problem = tls.server_config(&dir, "a.example").unwrap_err();
            assert_eq!(problem.code, "tls-certificate", "{tls:?}");
        }
    }
}
