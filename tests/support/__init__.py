"""What several test modules share: contracts, oracles, fault injection, programs of other processes."""
