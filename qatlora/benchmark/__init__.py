"""What qatlora's adapters cost and keep, beside plain PEFT on the same base."""
