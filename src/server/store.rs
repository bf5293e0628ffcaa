//! The records of the network on disk: one SQLite file, one writer, every answered write synced.
//!
//! `PRAGMA user_version` holds the schema's number; [`MIGRATIONS`] brings an older file up to date, each step in its own
//! transaction. A file of a newer program is refused, a damaged one too: neither is ever changed or replaced.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteSynchronous};
use sqlx::{Connection, SqliteConnection};

use crate::trust::record::SignedRecord;
use crate::wire::local::Problem;

/// Marks the file as ours (`PRAGMA application_id`): "mesh".
const APPLICATION_ID: i64 = 0x6d65_7368;

/// The steps from one schema to the next. Never edit one that was released; add to the end.
const MIGRATIONS: &[&str] = &[
    // 1: the log of records, and facts about it.
    "CREATE TABLE records (seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, json TEXT NOT NULL) STRICT;
     CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;
     PRAGMA application_id = 1835365224;
     PRAGMA user_version = 1;",
];

/// Another program that has the file open (a backup, a person with a shell) may hold it this long.
const BUSY: Duration = Duration::from_secs(5);

/// An open store. There is one in a process, and the state directory's lock sees to it that there is one process.
#[derive(Debug)]
pub struct Store {
    pool: SqlitePool,
    len: i64,
}

/// What a store holds.
#[derive(Debug, Default)]
pub struct Contents {
    /// The log, in order.
    pub records: Vec<SignedRecord>,
    /// The claim was spent.
    pub claim_spent: bool,
}

/// Why a write did not happen.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// Nothing of it was stored.
    #[error("nothing was stored: {0}")]
    NotStored(String),
    /// It cannot be told whether it was stored. The process must stop; the next start reads what is true.
    #[error("the store does not answer any more: {0}")]
    Unknown(String),
}

impl Store {
    /// Opens the store, making it if `create`, and reads it.
    ///
    /// # Errors
    /// `store-missing`, `store-newer`, `store-damaged`, or `store-failed`.
    pub async fn open(path: &Path, create: bool) -> Result<(Self, Contents), Problem> {
        prepare_file(path, create)?;
        let pool = SqlitePoolOptions::new()
            .max_connections(1)
            .acquire_timeout(BUSY * 2)
            .idle_timeout(None)
            .max_lifetime(None)
            .connect_with(options(path))
            .await
            .map_err(|e| problem(path, &e))?;
        let read = async {
            let mut connection = pool.acquire().await.map_err(|e| problem(path, &e))?;
            migrate(path, &mut connection).await?;
            read(path, &mut connection).await
        };
        match read.await {
            Ok(contents) => {
                let len = i64::try_from(contents.records.len()).unwrap_or(i64::MAX);
                Ok((Self { pool, len }, contents))
            }
            Err(e) => {
                pool.close().await;
                Err(e)
            }
        }
    }

    /// Appends records to the log, and marks the claim as spent if asked, in one transaction. When this returns `Ok`, a
    /// power cut does not undo it.
    ///
    /// # Errors
    /// [`WriteError`].
    pub async fn append(&mut self, records: &[SignedRecord], claim_spent: bool) -> Result<(), WriteError> {
        let after = self.len.saturating_add(i64::try_from(records.len()).unwrap_or(i64::MAX));
        let Err(error) = self.try_append(records, claim_spent).await else {
            self.len = after;
            return Ok(());
        };
        // Usually the transaction was rolled back, but an error of the commit itself says nothing about its effect.
        let stored: Result<i64, _> = sqlx::query_scalar("SELECT count(*) FROM records").fetch_one(&self.pool).await;
        match stored {
            Ok(len) if len == self.len && !records.is_empty() => Err(WriteError::NotStored(error.to_string())),
            Ok(len) if len == after && !records.is_empty() => {
                self.len = after;
                Ok(())
            }
            Ok(_) => Err(WriteError::Unknown(error.to_string())),
            Err(e) => Err(WriteError::Unknown(format!("{error}; then {e}"))),
        }
    }

    async fn try_append(&self, records: &[SignedRecord], claim_spent: bool) -> Result<(), sqlx::Error> {
        let mut tx = self.pool.begin_with("BEGIN IMMEDIATE").await?;
        for (seq, record) in (self.len..).zip(records) {
            let json = serde_json::to_string(record).map_err(|e| sqlx::Error::Encode(e.into()))?;
            sqlx::query("INSERT INTO records (seq, id, json) VALUES (?, ?, ?)")
                .bind(seq)
                .bind(record.id().to_string())
                .bind(json)
                .execute(&mut *tx)
                .await?;
        }
        if claim_spent {
            sqlx::query("INSERT OR REPLACE INTO meta (key, value) VALUES ('claim-spent', 'true')")
                .execute(&mut *tx)
                .await?;
        }
        tx.commit().await
    }

    /// Closes the file. Nothing is lost without it; with it the write-ahead log is folded in.
    pub async fn close(self) {
        self.pool.close().await;
    }
}

/// Whether the claim of the store at `path` is spent; works while a coordinator has it open.
///
/// # Errors
/// As [`Store::open`].
pub async fn claim_is_spent(path: &Path) -> Result<bool, Problem> {
    prepare_file(path, false)?;
    let mut connection = SqliteConnection::connect_with(&options(path)).await.map_err(|e| problem(path, &e))?;
    check_version(path, &mut connection).await?;
    let spent = read_claim(path, &mut connection).await;
    // Reading is done; how closing goes does not matter.
    let _ = connection.close().await;
    spent
}

fn options(path: &Path) -> SqliteConnectOptions {
    SqliteConnectOptions::new()
        .filename(path)
        .create_if_missing(false)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full)
        .busy_timeout(BUSY)
        .foreign_keys(true)
}

/// Makes an empty file of mode 0600 (SQLite gives the files beside it the same mode), or says that there is none.
fn prepare_file(path: &Path, create: bool) -> Result<(), Problem> {
    if create {
        return match OpenOptions::new().write(true).create_new(true).mode(0o600).open(path) {
            Ok(_) => Ok(()),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            Err(e) => Err(super::state_dir::unusable(path, &e)),
        };
    }
    match std::fs::metadata(path) {
        Ok(meta) if meta.len() > 0 => Ok(()),
        Ok(_) => Err(damaged(path, "it is empty")),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Err(Problem {
            code: "store-missing".into(),
            text: format!(
                "the coordinator's store {} is missing although the state directory has been used",
                path.display()
            ),
            hint: "restore it from a backup; or, to start a new network, remove the whole state directory".into(),
        }),
        Err(e) => Err(super::state_dir::unusable(path, &e)),
    }
}

async fn check_version(path: &Path, connection: &mut SqliteConnection) -> Result<usize, Problem> {
    let version: i64 =
        sqlx::query_scalar("PRAGMA user_version").fetch_one(&mut *connection).await.map_err(|e| problem(path, &e))?;
    let application: i64 =
        sqlx::query_scalar("PRAGMA application_id").fetch_one(&mut *connection).await.map_err(|e| problem(path, &e))?;
    let known = usize::try_from(version).ok().filter(|v| *v <= MIGRATIONS.len());
    match known {
        _ if version != 0 && application != APPLICATION_ID => Err(damaged(path, "it is another program's database")),
        Some(version) => Ok(version),
        None => Err(Problem {
            code: "store-newer".into(),
            text: format!(
                "the coordinator's store {} was written by a newer meshd (schema {version}, this one knows {})",
                path.display(),
                MIGRATIONS.len()
            ),
            hint: "run that meshd or a newer one; the store was not changed".into(),
        }),
    }
}

async fn migrate(path: &Path, connection: &mut SqliteConnection) -> Result<(), Problem> {
    let version = check_version(path, connection).await?;
    if version == 0 {
        let tables: i64 = sqlx::query_scalar("SELECT count(*) FROM sqlite_schema")
            .fetch_one(&mut *connection)
            .await
            .map_err(|e| problem(path, &e))?;
        if tables != 0 {
            return Err(damaged(path, "it is another program's database"));
        }
    }
    for step in MIGRATIONS.iter().copied().skip(version) {
        let apply = async {
            let mut tx = connection.begin_with("BEGIN IMMEDIATE").await?;
            sqlx::raw_sql(step).execute(&mut *tx).await?;
            tx.commit().await
        };
        apply.await.map_err(|e| problem(path, &e))?;
    }
    Ok(())
}

async fn read(path: &Path, connection: &mut SqliteConnection) -> Result<Contents, Problem> {
    let check: Vec<String> =
        sqlx::query_scalar("PRAGMA quick_check(1)").fetch_all(&mut *connection).await.map_err(|e| problem(path, &e))?;
    if check.first().map(String::as_str) != Some("ok") {
        return Err(damaged(path, check.first().map_or("the check says nothing", String::as_str)));
    }
    let rows: Vec<(i64, String, String)> = sqlx::query_as("SELECT seq, id, json FROM records ORDER BY seq")
        .fetch_all(&mut *connection)
        .await
        .map_err(|e| problem(path, &e))?;
    let mut records = Vec::with_capacity(rows.len());
    for (expected, (seq, id, json)) in (0..).zip(rows) {
        let record: SignedRecord =
            serde_json::from_str(&json).map_err(|e| damaged(path, &format!("record {seq} cannot be read ({e})")))?;
        if seq != expected || record.id().to_string() != id {
            return Err(damaged(path, &format!("record {expected} is missing or was altered")));
        }
        records.push(record);
    }
    Ok(Contents { records, claim_spent: read_claim(path, connection).await? })
}

async fn read_claim(path: &Path, connection: &mut SqliteConnection) -> Result<bool, Problem> {
    let spent: Option<String> = sqlx::query_scalar("SELECT value FROM meta WHERE key = 'claim-spent'")
        .fetch_optional(connection)
        .await
        .map_err(|e| problem(path, &e))?;
    Ok(spent.is_some())
}

fn damaged(path: &Path, why: &str) -> Problem {
    Problem {
        code: "store-damaged".into(),
        text: format!("the coordinator's store {} cannot be used: {why}", path.display()),
        hint: "it was left as it is. Restore it from a backup; or, to start a new network, move the whole state \
               directory away"
            .into(),
    }
}

/// SQLite's primary result codes (the low byte of the extended ones) that mean damage: CORRUPT and NOTADB.
const DAMAGE: [i64; 2] = [11, 26];

fn problem(path: &Path, e: &sqlx::Error) -> Problem {
    let code = e.as_database_error().and_then(sqlx::error::DatabaseError::code).and_then(|c| c.parse::<i64>().ok());
    if code.is_some_and(|c| DAMAGE.contains(&(c & 0xff))) {
        return damaged(path, &e.to_string());
    }
    Problem {
        code: "store-failed".into(),
        text: format!("the coordinator's store {} cannot be opened: {e}", path.display()),
        hint:
            "check that this user may write it and everything in its directory, that the disk has space, and that no \
               other program holds it"
                .into(),
    }
}

/// Reads `--store URL`; without one the store is in the state directory.
///
/// # Errors
/// `store-url`.
pub fn path_from_url(url: &str) -> Result<PathBuf, Problem> {
    let bad = |text: String, hint: &str| Problem { code: "store-url".into(), text, hint: hint.into() };
    let hint = "use --store sqlite:///path/to/store.db, or leave --store out to keep the store in the state directory";
    let Some((scheme, rest)) = url.split_once(':') else {
        return Err(bad(format!("--store {url:?} is not a URL"), hint));
    };
    match scheme {
        "sqlite" => {
            let path = rest.strip_prefix("//").unwrap_or(rest);
            if path.is_empty() || path.ends_with('/') {
                return Err(bad(format!("--store {url:?} names no file"), hint));
            }
            Ok(PathBuf::from(path))
        }
        "postgres" | "postgresql" => {
            Err(bad("this build of meshd has no PostgreSQL store, only SQLite".to_owned(), hint))
        }
        other => Err(bad(format!("meshd has no {other:?} store, only SQLite"), hint)),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::trust::record::HexSignature;
    use crate::wire::keys::Digest32;

    fn record(n: u8) -> SignedRecord {
        SignedRecord {
            payload: format!("{{\"n\":{n}}}"),
            signer: Digest32([n; 32]),
            sig: HexSignature([n; 64]),
            cosig: None,
        }
    }

    fn records(range: std::ops::Range<u8>) -> Vec<SignedRecord> {
        range.map(record).collect()
    }

    struct Place {
        _dir: tempfile::TempDir,
        path: PathBuf,
    }

    fn place() -> Place {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store.db");
        Place { _dir: dir, path }
    }

    #[tokio::test]
    async fn what_was_appended_is_there_after_reopening() {
        let place = place();
        let (mut store, contents) = Store::open(&place.path, true).await.unwrap();
        assert!(contents.records.is_empty() && !contents.claim_spent);
        assert!(!claim_is_spent(&place.path).await.unwrap());
        store.append(&records(0..4), true).await.unwrap();
        store.append(&records(4..5), false).await.unwrap();
        assert!(claim_is_spent(&place.path).await.unwrap());
        store.close().await;
        let (store, contents) = Store::open(&place.path, false).await.unwrap();
        assert_eq!(contents.records, records(0..5));
        assert!(contents.claim_spent);
        assert_eq!(std::fs::metadata(&place.path).unwrap().permissions().mode() & 0o777, 0o600);
        store.close().await;
    }

    #[tokio::test]
    async fn a_process_that_vanishes_leaves_every_answered_write() {
        let place = place();
        let (mut store, _) = Store::open(&place.path, true).await.unwrap();
        store.append(&records(0..3), true).await.unwrap();
        // What kill -9 leaves: the files as they are now, the write-ahead log included.
        let copy = tempfile::tempdir().unwrap();
        for name in ["store.db", "store.db-wal"] {
            std::fs::copy(place.path.with_file_name(name), copy.path().join(name)).unwrap();
        }
        let (found, contents) = Store::open(&copy.path().join("store.db"), false).await.unwrap();
        assert_eq!(contents.records, records(0..3));
        found.close().await;
        store.close().await;
    }

    #[tokio::test]
    async fn a_write_is_all_or_nothing() {
        let place = place();
        let (mut store, _) = Store::open(&place.path, true).await.unwrap();
        store.append(&records(0..2), false).await.unwrap();
        // The second of these has an id that is there already.
        let clash = [record(2), record(1)];
        assert!(matches!(store.append(&clash, true).await, Err(WriteError::NotStored(_))));
        store.append(&records(2..3), false).await.unwrap();
        store.close().await;
        let (store, contents) = Store::open(&place.path, false).await.unwrap();
        assert_eq!(contents.records, records(0..3));
        assert!(!contents.claim_spent);
        store.close().await;
    }

    #[tokio::test]
    async fn a_missing_an_empty_a_damaged_and_a_newer_store_are_told_apart_and_left_alone() {
        let place = place();
        assert_eq!(Store::open(&place.path, false).await.unwrap_err().code, "store-missing");
        std::fs::write(&place.path, b"").unwrap();
        assert_eq!(Store::open(&place.path, false).await.unwrap_err().code, "store-damaged");
        let garbage = b"this is not a database, however long one looks at it".repeat(100);
        std::fs::write(&place.path, &garbage).unwrap();
        let problem = Store::open(&place.path, false).await.unwrap_err();
        assert_eq!(problem.code, "store-damaged", "{}", problem.text);
        assert_eq!(std::fs::read(&place.path).unwrap(), garbage);
        std::fs::remove_file(&place.path).unwrap();

        let (store, _) = Store::open(&place.path, true).await.unwrap();
        sqlx::raw_sql("PRAGMA user_version = 99").execute(&store.pool).await.unwrap();
        store.close().await;
        let problem = Store::open(&place.path, false).await.unwrap_err();
        assert_eq!(problem.code, "store-newer");
        assert!(problem.text.contains("schema 99"), "{}", problem.text);
    }

    #[tokio::test]
    async fn altered_records_are_noticed() {
        for damage in [
            "UPDATE records SET json = replace(json, '1', '7') WHERE seq = 1",
            "DELETE FROM records WHERE seq = 1",
            "UPDATE records SET json = '{' WHERE seq = 1",
        ] {
            let place = place();
            let (mut store, _) = Store::open(&place.path, true).await.unwrap();
            store.append(&records(0..3), false).await.unwrap();
            sqlx::raw_sql(damage).execute(&store.pool).await.unwrap();
            store.close().await;
            assert_eq!(Store::open(&place.path, false).await.unwrap_err().code, "store-damaged", "{damage}");
        }
    }

    #[test]
    fn store_urls() {
        assert_eq!(path_from_url("sqlite:///var/x.db").unwrap(), PathBuf::from("/var/x.db"));
        assert_eq!(path_from_url("sqlite:x.db").unwrap(), PathBuf::from("x.db"));
        assert!(path_from_url("postgres://db/mesh").unwrap_err().text.contains("PostgreSQL"));
        for url in ["", "/var/x.db", "sqlite://", "redis://x", "sqlite:///var/"] {
            assert_eq!(path_from_url(url).unwrap_err().code, "store-url", "{url}");
        }
    }
}
