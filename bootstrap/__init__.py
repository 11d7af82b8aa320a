"""The bootstrap node: the first peer that everybody meets. It keeps no state that matters."""
