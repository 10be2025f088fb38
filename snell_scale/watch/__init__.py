"""`snell-scale watch`: how runs get on, read from their folders while they write them."""
