"""What reads or changes a net: its neurons found, compared, exchanged and described."""
