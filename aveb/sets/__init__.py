"""AVEB's official annotation files -> Records with the paper's prompts.  Paper Sec. 4.1, Table 6.

     annotation file --SETS[name].read--> Record, Record, ...   media are looked for, never fetched

   Each module reads the sets of one modality and adds them to SETS; registry.py has all of them."""
