//! The program: hand the command line to [`meshd::cli`] and exit with what it says.

use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::from(meshd::cli::run(std::env::args_os()))
}
