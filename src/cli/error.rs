//! Errors as people see them: what happened, why, what to do, and an exit code.
//!
//! A failed command prints `error: TEXT` and `hint: HINT` on standard error. With `--json` it also prints
//! `{"schema":1,"error":{"code":…,"text":…,"hint":…}}` on standard output, so that a script reading the output finds
//! either the document it asked for or the reason why there is none; the exit code is non-zero in both forms.

use std::fmt;

use crate::daemon::client::NOT_RUNNING;
use crate::wire::local::Problem;

/// What kind of failure it was; each has one exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The command line is wrong. Exit 2.
    Usage,
    /// No daemon answers on the socket. Exit 1.
    NotRunning,
    /// The command was understood and not carried out. Exit 1.
    Failed,
    /// `ping`: no answer, for whatever reason. Exit 2.
    NoAnswer,
    /// `ping --until-direct`: answered, but only through a relay. Exit 1.
    RelayOnly,
    /// The reader of the output went away. Exit 0, nothing is printed.
    BrokenPipe,
    /// Somebody else has told the person already. The exit code is given, nothing is printed.
    Told(u8),
}

impl Kind {
    /// The exit code of a process that ends with this kind of failure.
    #[must_use]
    pub const fn exit_code(self) -> u8 {
        match self {
            Self::BrokenPipe => 0,
            Self::Told(code) => code,
            Self::NotRunning | Self::Failed | Self::RelayOnly => 1,
            Self::Usage | Self::NoAnswer => 2,
        }
    }
}

/// A failure on its way to the person who typed the command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CliError {
    /// Decides the exit code.
    pub kind: Kind,
    /// A stable word, a sentence, and what to do about it.
    pub problem: Problem,
}

impl CliError {
    /// A failure with a stable `code`, a sentence and a hint (which may be empty).
    #[must_use]
    pub fn new(kind: Kind, code: &str, text: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { kind, problem: Problem { code: code.to_owned(), text: text.into(), hint: hint.into() } }
    }

    /// A command that was understood and not carried out.
    #[must_use]
    pub fn failed(code: &str, text: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::new(Kind::Failed, code, text, hint)
    }

    /// The same failure under another kind, that is: with another exit code.
    #[must_use]
    pub fn with_kind(mut self, kind: Kind) -> Self {
        self.kind = kind;
        self
    }
}

impl From<Problem> for CliError {
    /// What the daemon answered. [`NOT_RUNNING`] keeps its own exit code.
    fn from(problem: Problem) -> Self {
        let kind = if problem.code == NOT_RUNNING { Kind::NotRunning } else { Kind::Failed };
        Self { kind, problem }
    }
}

impl fmt::Display for CliError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.problem.text)
    }
}

impl std::error::Error for CliError {}

/// A command line that clap did not accept, in the form of every other error. `command` is the subcommand, if known.
#[must_use]
pub fn from_clap(error: &clap::Error, command: Option<&str>) -> CliError {
    let rendered = error.render().to_string();
    let mut text = String::new();
    let mut hint = String::new();
    for line in rendered.lines().map(str::trim).filter(|line| !line.is_empty()) {
        if let Some(tip) = line.strip_prefix("tip: ") {
            tip.clone_into(&mut hint);
        } else if let Some(usage) = line.strip_prefix("Usage: ") {
            if hint.is_empty() {
                hint = format!("usage: {usage}");
            }
        } else if !line.starts_with("For more information") {
            if !text.is_empty() {
                text.push(' ');
            }
            text.push_str(line.strip_prefix("error: ").unwrap_or(line));
        }
    }
    if hint.is_empty() {
        hint = match command {
            Some(command) => format!("meshd {command} --help shows its options and examples"),
            None => "meshd --help lists the commands".to_owned(),
        };
    }
    CliError::new(Kind::Usage, "usage", text, hint)
}
