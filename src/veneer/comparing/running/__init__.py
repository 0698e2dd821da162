"""Running: each run once, its line in the ledger, its test predictions sealed; resumable at every moment."""
