"""`grains verify`: is a server, or an engine of one's own, steering as it says?"""
