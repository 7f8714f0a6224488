"""What runs downstream, without torch and the rest of `dho`; training uses it too, so both see the same pixels."""
