"""Generated from ``proto/moeserve/pb/*.proto`` by ``make proto``; a test holds the two together."""
