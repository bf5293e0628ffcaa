//! `meshd version`.

use serde::Serialize;

use crate::cli::Global;
use crate::cli::error::CliError;
use crate::wire::version;

#[derive(Serialize)]
struct Document {
    schema: u16,
    version: &'static str,
    control: version::VersionRange,
    relay: version::VersionRange,
    peer: u8,
}

pub(super) fn run(global: &Global) -> Result<(), CliError> {
    let document = Document {
        schema: version::LOCAL,
        version: version::PROGRAM,
        control: version::CONTROL,
        relay: version::RELAY,
        peer: version::PEER,
    };
    global.output().show(&document, |d| format!("meshd {}", d.version))
}
