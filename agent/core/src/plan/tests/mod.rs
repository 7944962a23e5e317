//! Laws of design.md 9 on plans.
