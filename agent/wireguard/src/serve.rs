//! One device for each file in a directory.

use std::io;
use std::path::Path;

/// Not written yet: always an error that says so.
pub fn run(_dir: &Path) -> Result<(), io::Error> {
    Err(io::Error::other("`serve` is not there yet: start devices one by one"))
}
