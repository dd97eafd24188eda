-- The changes of one iteration, in one call.
--
-- Keys of a shard. They share the hash tag {shard}, so that they live in one slot of a cluster; only
-- the first is passed, the others are derived from it.
--
--   fastserve:{shard}:epoch        string  epoch of the last leader; grows with each of them
--   fastserve:{shard}:lease        string  "<epoch> <owner>", expires unless the leader renews it
--   fastserve:{shard}:seq          string  number of the last write of this epoch
--   fastserve:{shard}:level:<0-63> zset    live jobs of a level, by the order in which they entered it
--   fastserve:{shard}:finished     zset    ended jobs, by the unix time at which they expire
--   fastserve:{shard}:job:<id>     hash    what was submitted: tenant tenant_weight
--                                          service_class priority arrival_unix_s deadline_unix_s
--                                          min_output_tokens traceparent sampling (JSON)
--                                          prompt ("1,2,3,"); where it stands: level order attained_s
--                                          preemptions state; once ended: finish_reason error
--   fastserve:{shard}:log:<id>     string  its output tokens, "1,2,3,": appended to by every write
--   fastserve:{shard}:workers      hash    worker id -> JSON, for people
--
-- KEYS  1 epoch
-- ARGV  1 epoch of the writer
--       2 number of this write
--       3 number of the write before it, or -1 when what is stored may be older than that (a snapshot)
--       4 unix time, seconds
--       5 seconds for which ended jobs are kept
--       6 appended tokens, lines "<id> <1,2,3,>"
--       7 placements, lines "<id> <level> <order> <attained_s> <preemptions> <state>"
--       8 count of whole jobs; for each: id, level, order, output ("1,2,3,"), count of values,
--         then field, value, ... of its hash
--       . count of ended jobs; for each: id, state, reason, error
--       . count of jobs to forget; for each: id
--       . count of workers; for each: id, JSON
--
-- Returns 1, or 0 for a write that came too late and was left out. Errors: FENCED (a newer leader has
-- written or may write), LOST (Redis does not hold what it once confirmed: renew the lease, then
-- write a snapshot).

local call = redis.call
local base = string.sub(KEYS[1], 1, -6)

local epoch = tonumber(call('GET', KEYS[1]) or '0')
local mine = tonumber(ARGV[1])
if epoch > mine then
  return redis.error_reply('FENCED by epoch ' .. epoch)
end
local stored = tonumber(call('GET', base .. 'seq') or '0')
if epoch == mine and stored >= tonumber(ARGV[2]) then
  return 0
end
if epoch < mine or (ARGV[3] ~= '-1' and stored ~= tonumber(ARGV[3])) then
  return redis.error_reply('LOST: epoch ' .. epoch .. ', write ' .. stored)
end
call('SET', base .. 'seq', ARGV[2])

local at = 8
local function take()
  local value = ARGV[at]
  at = at + 1
  return value
end

local function place(id, level, order)
  local old = call('HGET', base .. 'job:' .. id, 'level')
  if old and old ~= level then
    call('ZREM', base .. 'level:' .. old, id)
  end
  call('ZADD', base .. 'level:' .. level, order, id)
end

for _ = 1, tonumber(take()) do
  local id, level, order, output, count = take(), take(), take(), take(), tonumber(take())
  local key, log = base .. 'job:' .. id, base .. 'log:' .. id
  place(id, level, order)
  call('DEL', key, log)
  call('HSET', key, 'level', level, 'order', order, unpack(ARGV, at, at + count - 1))
  at = at + count
  call('SET', log, output)
end

for id, tokens in string.gmatch(ARGV[6], '(%S+) (%S+)\n') do
  call('APPEND', base .. 'log:' .. id, tokens)
end

local placement = '(%S+) (%S+) (%S+) (%S+) (%S+) (%S+)\n'
for id, level, order, attained, preemptions, state in string.gmatch(ARGV[7], placement) do
  place(id, level, order)
  call('HSET', base .. 'job:' .. id, 'level', level, 'order', order, 'attained_s', attained,
    'preemptions', preemptions, 'state', state)
end

local function unqueue(id)
  local level = call('HGET', base .. 'job:' .. id, 'level')
  if level then
    call('ZREM', base .. 'level:' .. level, id)
  end
end

local ended = tonumber(take())
for _ = 1, ended do
  local id, state, reason, message = take(), take(), take(), take()
  unqueue(id)
  call('HSET', base .. 'job:' .. id, 'state', state, 'finish_reason', reason, 'error', message)
  call('EXPIRE', base .. 'job:' .. id, ARGV[5])
  call('EXPIRE', base .. 'log:' .. id, ARGV[5])
  call('ZADD', base .. 'finished', ARGV[4] + ARGV[5], id)
end
if ended > 0 then
  call('ZREMRANGEBYSCORE', base .. 'finished', '-inf', '(' .. ARGV[4])
end

for _ = 1, tonumber(take()) do
  local id = take()
  unqueue(id)
  call('ZREM', base .. 'finished', id)
  call('DEL', base .. 'job:' .. id, base .. 'log:' .. id)
end

for _ = 1, tonumber(take()) do
  call('HSET', base .. 'workers', take(), take())
end
return 1
