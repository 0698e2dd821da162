"""veneer"""
