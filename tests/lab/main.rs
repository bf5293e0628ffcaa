//! The lab: the real binary in network namespaces, behind the kernel's own NATs.
//!
//! A runner of its own, because a namespace must be entered before the first thread starts. Every case runs in a process
//! tree and namespaces of its own (`meshd::cli::demo::contain`), one after the other, and leaves nothing behind. What
//! cannot run on this machine is printed with its reason and counted as ignored.
//!
//! ```text
//! cargo test --test lab                      all cases
//! cargo test --test lab -- upgrade           those whose name holds the word
//! cargo test --test lab -- --list            their names
//! cargo test --test lab -- --show-output     with what each measured
//! cargo test --test lab -- --shell home-nat  a topology to poke at (scripts/lab)
//! MESHD_LAB_SHORT=1 …                        leave out what takes minutes
//! MESHD_LAB_KEEP_LOGS=DIR …                  keep the logs of failed cases
//! ```

#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    clippy::print_stdout,
    reason = "a program that does I/O"
)]
#![allow(clippy::unwrap_used, reason = "a test")]
#![allow(unreachable_pub, reason = "a program: nothing in it is reached from outside")]

mod cases;
mod contact;
mod flow;
mod home_router;
mod machine;
mod nats;
mod net;
mod packets;
mod picture;
mod runner;
mod services;
mod world;

use std::process::ExitCode;

fn main() -> ExitCode {
    runner::main(&cases::all())
}
