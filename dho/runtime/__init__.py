"""What runs downstream: no torch, no other part of `dho`. Training uses the same functions, so both see the same pixels."""
