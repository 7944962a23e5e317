//! Programs of others that some tests compare with, built once and kept outside the tree, by version.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::place::words;
use crate::sandbox::which;

/// The release of wireguard-go that tests use.
const WIREGUARD_GO: &str = "v0.0.0-20260522210424-ecfc5a8d5446";

/// Path of wireguard-go, built by Go if it is not in the cache yet.
///
/// # Errors
/// If Go is missing or the build fails.
pub fn wireguard_go() -> Result<PathBuf> {
    go_program("wireguard", "golang.zx2c4.com/wireguard", WIREGUARD_GO)
}

fn go_program(program: &str, package: &str, version: &str) -> Result<PathBuf> {
    let home = || Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache/tombolo"));
    let cache = std::env::var_os("TOMBOLO_CACHE").map(PathBuf::from).or_else(home);
    let dir = cache.context("neither TOMBOLO_CACHE nor HOME is set")?.join(format!("{program}-{version}"));
    let path = dir.join(program);
    if path.is_file() {
        return Ok(path);
    }
    let go = which("go").or_else(|| Some(PathBuf::from("/usr/local/go/bin/go")).filter(|p| p.is_file()));
    let go =
        go.with_context(|| format!("this test needs Go to build {package}: apt-get install golang-go"))?;
    std::fs::create_dir_all(&dir)?;
    let output =
        Command::new(go).arg("install").arg(format!("{package}@{version}")).env("GOBIN", &dir).output()?;
    ensure!(output.status.success(), "building {package}@{version}: {}", words(&output));
    Ok(path)
}
