"""Child processes: ``child`` starts, watches and ends them; the standard library only.

ask  answer                     a conversation in lines of JSON, with deadlines: parent and child
pool  job_worker  serve_jobs    a few workers for jobs that may take any time and memory: who
                                shares them out, one of them seen from outside and from inside
frames                          how jobs and replies travel
"""
