"""What was asked and answered, on the disk: written ahead, sealed as Parquet, kept, encrypted, erased."""
